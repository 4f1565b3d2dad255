"""swiglu, forward and backward, beside its definition."""

from __future__ import annotations

import pytest
import torch

from benches.memory_bound import DTYPE, GPU, IMPLS, TOLERANCE, chosen, measure, noise
from llava_kernels import swiglu
from llava_kernels.swiglu import swiglu_reference

SHAPES = [(16384, 11008), (16384, 13824)] if GPU else [(64, 256)]  # (tokens, F): LLaVA 7B, 13B
PASSES = {"swiglu": 3, "swiglu backward": 5}  # of tensors of the output's size that pass through memory


def make(impl: str, work: str, shape: tuple[int, int]):
    """A function without arguments that does the work once and returns its result."""
    torch.manual_seed(0)
    op = chosen(impl, swiglu, swiglu_reference)
    gate_up, d_out = noise(shape[0], 2 * shape[1]), noise(*shape)
    if work == "swiglu":
        return lambda: op(gate_up)
    gate_up.requires_grad_()
    out = op(gate_up)
    return lambda: torch.autograd.grad(out, gate_up, d_out, retain_graph=True)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("work", PASSES)
def test_swiglu(benchmark, work, shape, impl):
    if impl == "compiled" and "backward" in work:
        pytest.skip("a compiled backward pass frees what it read, so that it cannot be timed alone")
    torch.testing.assert_close(make(impl, work, shape)(), make("eager", work, shape)(), **TOLERANCE)
    benchmark.group = f"{work}, {shape[0]} x {shape[1]}"
    measure(benchmark, lambda: make(impl, work, shape), PASSES[work] * shape[0] * shape[1] * DTYPE.itemsize, shape)
