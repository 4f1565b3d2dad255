"""Decoding, a chunk of a prompt, and storing keys and values, against a paged cache of bfloat16 and float8."""

from __future__ import annotations

import pytest
import torch

import llava_kernels
from benches.ceiling import matmul_ceiling
from benches.memory_bound import DEVICE, DTYPE, GPU, TOLERANCE, measure
from llava_kernels.attention import paged_attention, store_kv

FP8 = torch.float8_e4m3fn
HEADS, HEAD_DIM = (32, 128) if GPU else (4, 32)  # LLaVA 7B
PAGE = 16
# (sequences, queries of each, tokens of each in the cache)
WORK = {
    "decode, 64 sequences": (64, 1, 1000),
    "decode, 1 sequence": (1, 1, 1000),
    "chunk of a prompt": (1, 512, 2048),
}
if not GPU:
    WORK = {"decode, 4 sequences": (4, 1, 100), "chunk of a prompt": (1, 32, 128)}


class Cache:
    def __init__(self, sequences: int, queries: int, context: int, stored: torch.dtype) -> None:
        torch.manual_seed(0)
        blocks = -(-context // PAGE)
        shape = (sequences * blocks, PAGE, HEADS, HEAD_DIM)
        self.k, self.v = (torch.randn(shape, device=DEVICE).to(stored) for _ in "kv")
        self.table = torch.randperm(sequences * blocks, device=DEVICE).int().view(sequences, blocks)
        self.lens = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
        self.starts = queries * torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE)
        self.q = torch.randn(sequences * queries, HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
        self.bounds = {"max_query": queries, "max_context": context}

    def attend(self, impl: str) -> torch.Tensor:
        with llava_kernels.implementation({"ours": "auto", "eager": "reference"}[impl]):
            return paged_attention(self.q, self.k, self.v, self.table, self.lens, self.starts, **self.bounds)


@pytest.mark.parametrize("impl", ["ours", "eager"])
@pytest.mark.parametrize("stored", [DTYPE, FP8], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("work", WORK)
def test_paged_attention(benchmark, work, stored, impl):
    sequences, queries, context = WORK[work]
    cache = Cache(sequences, queries, context, stored)
    torch.testing.assert_close(cache.attend(impl), cache.attend("eager"), **TOLERANCE)
    benchmark.group = f"paged_attention, {work}, {str(stored).removeprefix('torch.')} cache"
    moved = 2 * sequences * context * HEADS * HEAD_DIM * stored.itemsize + 2 * cache.q.numel() * DTYPE.itemsize
    if impl == "eager" and GPU:  # it reads the lengths on the host, which no CUDA graph allows
        benchmark.pedantic(lambda: (cache.attend(impl), torch.cuda.synchronize()), rounds=20, warmup_rounds=2)
        if benchmark.stats is not None:
            rate = moved / benchmark.stats.stats.median
            benchmark.extra_info |= {"shape": str((sequences, context)), "device": "cuda", "gb_per_s": rate / 1e9}
        return
    measure(benchmark, lambda: lambda: cache.attend(impl), moved, (sequences, queries, context))
    if queries > 1 and "gb_per_s" in benchmark.extra_info:  # bound by arithmetic, not by memory
        pairs = sequences * (queries * context - queries * (queries - 1) // 2)  # of a query and a key that it sees
        rate = 4 * pairs * HEADS * HEAD_DIM * benchmark.extra_info["gb_per_s"] * 1e9 / moved
        benchmark.extra_info["tflop_per_s"] = rate / 1e12
        benchmark.extra_info["of_matmul_ceiling"] = rate / matmul_ceiling(DEVICE, DTYPE)


@pytest.mark.parametrize("impl", ["ours", "eager"])
@pytest.mark.parametrize("stored", [DTYPE, FP8], ids=lambda d: str(d).removeprefix("torch."))
def test_store_kv(benchmark, stored, impl):
    tokens = 8192 if GPU else 256
    torch.manual_seed(0)
    k, v = (torch.randn(tokens, HEADS, HEAD_DIM, device=DEVICE).to(DTYPE) for _ in "kv")
    slots = torch.randperm(tokens, device=DEVICE)
    caches = {
        n: [torch.zeros(tokens // PAGE, PAGE, HEADS, HEAD_DIM, device=DEVICE).to(stored) for _ in "kv"] for n in "ab"
    }

    def store(name: str, kept: list[torch.Tensor]) -> None:
        with llava_kernels.implementation({"ours": "auto", "eager": "reference"}[name]):
            store_kv(k, v, *kept, slots)

    store(impl, caches["a"])
    store("eager", caches["b"])
    for mine, expected in zip(caches["a"], caches["b"], strict=True):
        assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))
    benchmark.group = f"store_kv, {tokens} tokens, {str(stored).removeprefix('torch.')} cache"
    moved = 2 * k.numel() * (DTYPE.itemsize + stored.itemsize)
    if impl == "eager" and GPU:  # it looks up on the host which tokens are stored
        benchmark.pedantic(lambda: (store(impl, caches["a"]), torch.cuda.synchronize()), rounds=20, warmup_rounds=2)
        return
    measure(benchmark, lambda: lambda: store(impl, caches["a"]), moved, tuple(k.shape))
