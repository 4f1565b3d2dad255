"""linear_cross_entropy with its gradients, head trained and frozen, beside its definition and others' fused versions.

Time includes backward, because some of the members compute the gradients in the forward pass and some in backward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.ceiling import matmul_ceiling
from benches.memory_bound import DEVICE, DTYPE, GPU
from llava_kernels import linear_cross_entropy
from llava_kernels.linear_cross_entropy import linear_cross_entropy_reference

# Supervised rows, width, vocabulary: LLaVA 7B and 13B on a GPU, the tiny preset elsewhere.
SHAPES = (
    [(4096, 4096, 32_000), (16_384, 4096, 32_000), (4096, 5120, 32_000), (16_384, 5120, 32_000)]
    if GPU
    else [(64, 128, 640)]
)
CHUNKS = 8  # of the compiled member


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # None is torch's unfused path; the chunked one is asked for by options.
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def ligers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


def compiled_chunks() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    one = torch.compile(linear_cross_entropy_reference)

    def chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(
            [one(h, weight, y) for h, y in zip(hidden.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True)]
        ).sum()

    return chunks


MEMBERS: dict[str, Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "ours": lambda: linear_cross_entropy,
    "eager": lambda: linear_cross_entropy_reference,
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    MEMBERS["torch"] = lambda: torchs
if GPU:
    MEMBERS["compiled chunks"] = compiled_chunks
if GPU and importlib.util.find_spec("liger_kernel"):
    MEMBERS["liger"] = lambda: ligers


def make(impl: str, trained: bool, shape: tuple[int, int, int]) -> Callable[[], tuple[Tensor, ...]]:
    """A function that returns the loss, and gradients of the mean as training takes them."""
    rows, dim, vocab = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, dim, device=DEVICE, generator=generator).to(DTYPE).requires_grad_()
    weight = (torch.randn(vocab, dim, device=DEVICE, generator=generator) * 2 / dim**0.5).to(DTYPE)
    labels = torch.randint(0, vocab, (rows,), device=DEVICE, generator=generator)
    inputs = (hidden, weight.requires_grad_()) if trained else (hidden,)
    op = MEMBERS[impl]()

    def step() -> tuple[Tensor, ...]:
        loss = op(hidden, weight, labels)
        gradients = torch.autograd.grad(loss / rows, inputs)
        if GPU:
            torch.cuda.synchronize()
        return loss.detach(), *gradients

    return step


def check(mine: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Relative to the norm: single values of a gradient in bf16 differ by more."""
    for a, b in zip(mine, expected, strict=True):
        assert (a.float() - b.float()).norm() <= (2e-2 if GPU else 1e-5) * b.float().norm()


@pytest.mark.parametrize("impl", MEMBERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_linear_cross_entropy(benchmark, head, shape, impl):
    trained = head == "trained"
    step = make(impl, trained, shape)
    check(step(), make("eager", trained, shape)())
    benchmark.group = f"linear_cross_entropy and backward, head {head}, {' x '.join(map(str, shape))}"
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        benchmark.extra_info["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        benchmark.pedantic(step, rounds=20, warmup_rounds=3)
    else:
        benchmark(step)
    if benchmark.stats is None:
        return  # --benchmark-disable: the check above is all that was asked for
    rows, dim, vocab = shape
    rate = 2 * rows * dim * vocab * (3 if trained else 2) / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "shape": str(shape),
        "dtype": str(DTYPE),
        "device": DEVICE.type,
        "tflop_per_s": rate / 1e12,
    }
    if GPU:
        benchmark.extra_info["of_matmul_ceiling"] = rate / matmul_ceiling(DEVICE, DTYPE)
