"""What the card can do at best, measured in the same run: a large copy and a large matrix product."""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def copy_ceiling(device: torch.device) -> float:
    """Bytes a second, read plus written, of a copy of 1 GiB on a GPU (64 MiB elsewhere)."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square product: 8192 on a GPU, 1024 elsewhere; random values, as real weights are."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ b, device)


def seconds(work, device: torch.device, rounds: int = 10) -> float:
    """Median time of ``work`` after two rounds of warm-up."""
    times = []
    for i in range(rounds + 2):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end) / 1000
        else:
            begun = time.perf_counter()
            work()
            taken = time.perf_counter() - begun
        if i >= 2:
            times.append(taken)
    return sorted(times)[len(times) // 2]
