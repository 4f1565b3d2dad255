"""rope_store_kv on a layer's merged product, beside rope_ and store_kv one after the other."""

from __future__ import annotations

import pytest
import torch

import llava_kernels
from benches.memory_bound import DEVICE, DTYPE, GPU, TOLERANCE, measure, noise
from llava_kernels import rope_, rope_store_kv, store_kv

FP8 = torch.float8_e4m3fn
PAGE = 16
# (tokens, heads, kv_heads, head_dim): LLaVA 7B decoding 64 and one sequences, a prompt; eight key heads, as Mistral has
SHAPES = [(64, 32, 32, 128), (1, 32, 32, 128), (8192, 32, 32, 128), (64, 32, 8, 128)] if GPU else [(64, 4, 2, 32)]


class Layer:
    """The arguments, keys and values side by side in one cache, as the engine keeps them."""

    def __init__(self, shape: tuple[int, int, int, int], stored: torch.dtype) -> None:
        torch.manual_seed(0)
        tokens, self.heads, kv_heads, head_dim = shape
        self.qkv = noise(tokens, self.heads + 2 * kv_heads, head_dim)
        freqs = 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=DEVICE)
        angles = torch.arange(tokens, device=DEVICE)[:, None] * freqs
        self.cos, self.sin = angles.cos(), angles.sin()
        blocks = -(-tokens // PAGE)
        self.cache = torch.zeros(blocks, PAGE, 2, kv_heads, head_dim, device=DEVICE).to(stored)
        self.slots = torch.randperm(blocks * PAGE, device=DEVICE)[:tokens]

    def run(self, impl: str) -> torch.Tensor:
        """The turned queries, (tokens, heads, head_dim). They lie in qkv, so each call turns them further."""
        k_cache, v_cache = self.cache.unbind(2)
        if impl == "one launch":
            return rope_store_kv(self.qkv, self.cos, self.sin, k_cache, v_cache, self.slots, heads=self.heads)
        kv_heads = k_cache.shape[2]
        rope_(self.qkv[:, : self.heads + kv_heads], self.cos, self.sin)
        q, k, v = self.qkv.split((self.heads, kv_heads, kv_heads), dim=1)
        store_kv(k, v, k_cache, v_cache, self.slots)
        return q


@pytest.mark.parametrize("impl", ["one launch", "rope_ and store_kv"])
@pytest.mark.parametrize("stored", [DTYPE, FP8], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rope_store_kv(benchmark, shape, stored, impl):
    layer, other = Layer(shape, stored), Layer(shape, stored)
    with llava_kernels.implementation("reference"):
        expected = other.run("one launch")
    torch.testing.assert_close(layer.run(impl), expected, **TOLERANCE)
    coarse = {"rtol": 0.13, "atol": 0.01} if stored is FP8 else TOLERANCE  # a step of float8
    torch.testing.assert_close(layer.cache.float(), other.cache.float(), **coarse)
    tokens, heads, kv_heads, head_dim = shape
    benchmark.group = f"rope and store_kv, {shape}, {str(stored).removeprefix('torch.')} cache"
    # Queries in and out, keys and values in, both into the cache, cosines and sines: the least that can be moved.
    least = (2 * heads + 2 * kv_heads) * DTYPE.itemsize + 2 * kv_heads * stored.itemsize + 4
    measure(benchmark, lambda: lambda: layer.run(impl), tokens * head_dim * least, shape)
