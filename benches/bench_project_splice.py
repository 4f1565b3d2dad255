"""project_splice and its backward beside transformers' way (embedding, projector, masked_scatter) and the bare product.

"eager" does what transformers' LLaVA does, with its check that image tokens and features are equally many. "gemm" is
the projector's product alone, on features that already lie in one run: what nothing that includes it can fall below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.ceiling import matmul_ceiling
from benches.memory_bound import DEVICE, DTYPE, GPU, REPEATS, noise
from llava_kernels import project_splice

# Images, patches, C, D, text rows. On a GPU LLaVA-1.5 and v1 of 7B and 13B, a batch of 16 images and a single one.
SHAPES = (
    [
        (16, 576, 1024, 4096, 2048),
        (16, 256, 1024, 4096, 2048),
        (16, 256, 1024, 5120, 2048),
        (16, 576, 4096, 4096, 2048),
        (16, 576, 5120, 5120, 2048),
        (1, 576, 1024, 4096, 64),
        (1, 576, 4096, 4096, 64),
    ]
    if GPU
    else [(4, 64, 128, 256, 100)]
)
VOCABULARY = 32_064 if GPU else 640
IMAGE = VOCABULARY - 1


@dataclass
class Case:
    features: Tensor  # (N, n, C), the class token skipped
    weight: Tensor
    bias: Tensor
    embedding: Tensor
    input_ids: Tensor
    image_rows: Tensor
    text_rows: Tensor
    grad: Tensor  # (T, D)


def make(shape: tuple[int, ...]) -> Case:
    """One sequence after the other, each a picture amid its share of the text."""
    images, patches, c, d, text = shape
    torch.manual_seed(0)
    ids = torch.randint(0, IMAGE, (images * patches + text,))
    share = len(ids) // images
    image_rows = torch.cat([i * share + 5 + torch.arange(patches) for i in range(images)])
    ids[image_rows] = IMAGE
    text_rows = (ids != IMAGE).nonzero()[:, 0]
    return Case(
        features=noise(images, 1 + patches, c)[:, 1:],
        weight=(noise(d, c) / c**0.5).requires_grad_(),
        bias=noise(d).requires_grad_(),
        embedding=noise(VOCABULARY, d).requires_grad_(),
        input_ids=ids.to(DEVICE),
        image_rows=image_rows.int().to(DEVICE),
        text_rows=text_rows.int().to(DEVICE),
        grad=noise(len(ids), d),
    )


def ours(x: Case) -> Tensor:
    return project_splice(x.features, x.weight, x.bias, x.embedding, x.input_ids, x.image_rows, x.text_rows)


def eager(x: Case) -> Tensor:
    image = F.linear(x.features, x.weight, x.bias).flatten(0, 1)
    out = F.embedding(x.input_ids, x.embedding)
    mask = (x.input_ids == IMAGE).unsqueeze(-1).expand_as(out)
    if out[mask].numel() != image.numel():
        raise ValueError("image tokens and image features are not equally many")
    return out.masked_scatter(mask, image)


def forward(impl: str, case: Case) -> Callable[[], Tensor]:
    if impl == "gemm":
        features = case.features.contiguous()
        return torch.no_grad()(lambda: F.linear(features, case.weight, case.bias))
    return torch.no_grad()(lambda: {"ours": ours, "eager": eager}[impl](case))


def backward(impl: str, case: Case, table: str) -> Callable[[], tuple[Tensor, ...]]:
    if impl == "gemm":
        rows, features = case.grad[case.image_rows], case.features.flatten(0, 1)
        return lambda: (rows.t() @ features,)
    case.embedding.requires_grad_(table == "trained")
    inputs = [t for t in (case.weight, case.bias, case.embedding) if t.requires_grad]
    out = {"ours": ours, "eager": eager}[impl](case)
    return lambda: torch.autograd.grad(out, inputs, case.grad, retain_graph=True)


def check(mine: Tensor, expected: Tensor) -> None:
    """Relative to the norm: single values in bf16 differ by more."""
    assert (mine.float() - expected.float()).norm() <= (2e-2 if GPU else 1e-5) * expected.float().norm()


def measure(benchmark, work: Callable[[], Any], operations: int, shape: tuple[int, ...]) -> None:
    """Time the work; ``operations`` additions and multiplications are in it. On a GPU a round is REPEATS of them."""

    def repeated() -> None:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()

    if GPU:
        benchmark.pedantic(repeated, rounds=20, warmup_rounds=3)
    else:
        benchmark(work)
    if benchmark.stats is None:
        return  # --benchmark-disable: the caller's check is all that was asked for
    rate = operations * (REPEATS if GPU else 1) / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "shape": str(shape),
        "dtype": str(DTYPE),
        "device": DEVICE.type,
        "tflop_per_s": rate / 1e12,
    }
    if GPU:
        benchmark.extra_info |= {
            "repeats_a_round": REPEATS,
            "of_matmul_ceiling": rate / matmul_ceiling(DEVICE, DTYPE),
        }


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def product(shape: tuple[int, ...]) -> int:
    images, patches, c, d, _ = shape
    return 2 * images * patches * c * d


@pytest.mark.parametrize("impl", ["ours", "eager", "gemm"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_forward(benchmark, shape, impl):
    case = make(shape)
    work, expected = forward(impl, case), forward("eager", case)()
    if impl == "gemm":
        expected = expected[case.image_rows]
    check(work().reshape(expected.shape), expected)
    benchmark.group = f"project_splice, {name(shape)}"
    measure(benchmark, work, product(shape), shape)


@pytest.mark.parametrize(
    ("table", "impl"),
    [("frozen", "ours"), ("frozen", "eager"), ("frozen", "gemm"), ("trained", "ours"), ("trained", "eager")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_backward(benchmark, shape, table, impl):
    """Gradients of weight and bias, and of the embedding table where it is trained."""
    case = make(shape)
    expected = backward("eager", case, table)()
    work = backward(impl, case, table)
    for mine, theirs in zip(work(), expected[:1] if impl == "gemm" else expected, strict=True):
        check(mine, theirs)
    benchmark.group = f"project_splice backward, table {table}, {name(shape)}"
    measure(benchmark, work, product(shape), shape)
