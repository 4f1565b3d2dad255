"""Causal attention over packed sequences of mixed lengths, forward and backward, by every back end that runs here."""

from __future__ import annotations

import pytest
import torch

from benches.ceiling import matmul_ceiling
from benches.memory_bound import DEVICE, DTYPE, GPU
from llava_kernels import varlen_attention
from llava_kernels.attention import IMPLEMENTATIONS
from llava_kernels.attention.varlen import choose

# LLaVA 7B's heads. 16384 tokens each: captions and conversations about pictures of 576 rows; one long sequence.
CASES = {
    "mixed": ((640,) * 8 + (1024,) * 6 + (1536,) * 2 + (2048,), 32, 128),
    "long": ((16384,), 32, 128),
}
if not GPU:
    CASES = {"mixed": ((40, 64, 100, 150), 4, 64)}
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2} if GPU else {"rtol": 1e-4, "atol": 1e-4}


def impls() -> list[str]:
    found = ["ours", "eager"]
    for name in IMPLEMENTATIONS:
        if name == "reference":
            continue
        try:
            choose(name, DEVICE, DTYPE, 128)
        except (ImportError, ValueError):
            continue
        found.append(name)
    return found if GPU else [n for n in found if n != "triton"]  # the interpreter's time says nothing


class Run:
    def __init__(self, impl: str, case: str) -> None:
        torch.manual_seed(0)
        self.seqlens, heads, head_dim = CASES[case]
        tokens = sum(self.seqlens)
        merged = torch.randn(tokens, 3 * heads, head_dim, device=DEVICE).to(DTYPE)  # as the merged product gives it
        self.qkv = [x.requires_grad_() for x in merged.chunk(3, dim=1)]
        self.d_out = torch.randn(tokens, heads, head_dim, device=DEVICE).to(DTYPE)
        self.ends = torch.tensor([0, *torch.tensor(self.seqlens).cumsum(0)], dtype=torch.int32, device=DEVICE)
        self.name = {"ours": "auto", "eager": "reference"}.get(impl, impl)
        # Two products a pair of tokens that see each other; backward five. Half of the pairs, as it is causal.
        self.forward_flop = 2 * heads * head_dim * sum(n * n for n in self.seqlens)
        self.out = self.forward()

    def forward(self) -> torch.Tensor:
        return varlen_attention(*self.qkv, self.seqlens, implementation=self.name, cu_seqlens=self.ends)

    def backward(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.out, self.qkv, self.d_out, retain_graph=True)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("work", ["forward", "backward"])
def test_varlen_attention(benchmark, work, case, impl):
    if impl == "eager" and GPU and case == "long":
        pytest.skip("the definition holds all scores of a sequence: 34 GB in float32")
    run, other = Run(impl, case), Run("sdpa", case)  # sdpa: exact too, and it holds no scores
    for mine, expected in zip((run.out, *run.backward()), (other.out, *other.backward()), strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(mine / scale, expected / scale, **TOLERANCE)
    del other
    do = run.forward if work == "forward" else run.backward

    def timed() -> None:
        do()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"varlen_attention {work}, {case}"
    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
    if benchmark.stats is None:
        return  # --benchmark-disable: the check above is all that was asked for
    flop = run.forward_flop * (1 if work == "forward" else 2.5)
    rate = flop / benchmark.stats.stats.median
    shape = (
        f"{len(run.seqlens)} sequences, {sum(run.seqlens)} tokens, {run.qkv[0].shape[1]} heads of {run.qkv[0].shape[2]}"
    )
    benchmark.extra_info |= {"shape": shape, "dtype": str(DTYPE), "device": DEVICE.type, "tflop_per_s": rate / 1e12}
    if GPU:
        benchmark.extra_info["of_matmul_ceiling"] = rate / matmul_ceiling(DEVICE, DTYPE)
        if impl == "ours":
            benchmark.extra_info["chosen"] = choose("auto", DEVICE, DTYPE, 128)
