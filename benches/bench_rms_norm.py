"""rms_norm and add_rms_norm, forward and backward, beside their definition."""

from __future__ import annotations

import pytest
import torch

from benches.memory_bound import DTYPE, GPU, IMPLS, TOLERANCE, chosen, measure, noise
from llava_kernels import add_rms_norm, rms_norm
from llava_kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

SHAPES = [(16384, 4096), (16384, 5120)] if GPU else [(64, 256)]  # LLaVA 7B, 13B
EPS = 1e-5
# Tensors of x's size that pass through memory, read or written; weights and statistics are small beside them.
PASSES = {
    "rms_norm": 2,
    "add_rms_norm": 4,
    "rms_norm backward, weight frozen": 3,
    "rms_norm backward": 3,
    "add_rms_norm backward, weight frozen": 4,
    "add_rms_norm backward": 4,
}


def make(impl: str, work: str, shape: tuple[int, int]):
    """A function without arguments that does the work once and returns its results."""
    torch.manual_seed(0)
    x, residual, d_normed, d_sum = (noise(*shape) for _ in range(4))
    weight = noise(shape[1])
    if work.startswith("add"):
        op, terms, d_outputs = chosen(impl, add_rms_norm, add_rms_norm_reference), (x, residual), (d_normed, d_sum)
    else:
        op, terms, d_outputs = chosen(impl, rms_norm, rms_norm_reference), (x,), (d_normed,)
    if "backward" not in work:
        return lambda: op(*terms, weight, EPS)
    trained = terms if "frozen" in work else (*terms, weight)
    for tensor in trained:
        tensor.requires_grad_()
    outputs = op(*terms, weight, EPS)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return lambda: torch.autograd.grad(outputs, trained, d_outputs, retain_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("work", PASSES)
def test_rms_norm(benchmark, work, shape, impl):
    if impl == "compiled" and "backward" in work:
        pytest.skip("a compiled backward pass frees what it read, so that it cannot be timed alone")
    check(make(impl, work, shape)(), make("eager", work, shape)())
    benchmark.group = f"{work}, {shape[0]} x {shape[1]}"
    measure(benchmark, lambda: make(impl, work, shape), PASSES[work] * shape[0] * shape[1] * DTYPE.itemsize, shape)


def check(mine, expected) -> None:
    """Scaled to the largest value: the weight's gradient is a sum over all rows, taken by eager in rounded products."""
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (mine, expected)), strict=True):
        scale = b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, **TOLERANCE)
