"""rope and rope_ on the query and key heads of the merged product, forward and backward, beside the definition."""

from __future__ import annotations

import pytest
import torch

from benches.memory_bound import DEVICE, DTYPE, GPU, IMPLS, TOLERANCE, chosen, measure, noise
from llava_kernels import rope, rope_
from llava_kernels.rope import rope_reference

# (tokens, query + key heads, head_dim): LLaVA 7B, 13B; decoding 64 sequences.
SHAPES = [(16384, 64, 128), (16384, 80, 128), (64, 64, 128)] if GPU else [(64, 8, 32)]


def make(impl: str, work: str, shape: tuple[int, int, int]):
    """A function without arguments that does the work once and returns its result."""
    torch.manual_seed(0)
    tokens, heads, head_dim = shape
    x = noise(tokens, heads * 3 // 2, head_dim)[:, :heads]  # beside as many value heads as there are key heads
    angles = torch.arange(tokens, device=DEVICE)[:, None] * 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    if work == "rope_":
        op = chosen(impl, rope_, lambda x, cos, sin: x.copy_(rope_reference(x, cos, sin)))
        return lambda: op(x, cos, sin)
    op = chosen(impl, rope, rope_reference)
    if work == "rope":
        return lambda: op(x, cos, sin)
    d_out = noise(*shape)
    x.requires_grad_()
    out = op(x, cos, sin)
    return lambda: torch.autograd.grad(out, x, d_out, retain_graph=True)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("work", ["rope", "rope_", "rope backward"])
def test_rope(benchmark, work, shape, impl):
    if impl == "compiled" and "backward" in work:
        pytest.skip("a compiled backward pass frees what it read, so that it cannot be timed alone")
    torch.testing.assert_close(make(impl, work, shape)(), make("eager", work, shape)(), **TOLERANCE)
    tokens, heads, head_dim = shape
    moved = tokens * head_dim * (2 * heads * DTYPE.itemsize + 4)  # in, out; cosines and sines
    benchmark.group = f"{work}, {tokens} tokens, {heads} heads of {head_dim}"
    measure(benchmark, lambda: make(impl, work, shape), moved, shape)
