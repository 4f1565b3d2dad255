"""sample for a batch of decoding sequences, beside its definition, which sorts."""

from __future__ import annotations

import pytest
import torch

from benches.memory_bound import DEVICE, DTYPE, GPU, IMPLS, chosen, measure
from llava_kernels import sample
from llava_kernels.sample import sample_reference

SHAPES = [(1, 32_000), (64, 32_000)] if GPU else [(4, 640)]
ORDER = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
WORK: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "temperature, top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "every setting": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
    },
}


def make(impl: str, work: str, shape: tuple[int, int]):
    """A function without arguments that samples once."""
    rows = shape[0]
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = (4 * torch.randn(shape, device=DEVICE, generator=generator)).to(DTYPE)
    settings: list[torch.Tensor | None] = [
        torch.full((rows,), WORK[work][s], device=DEVICE, dtype=torch.int32 if s == "top_k" else torch.float32)
        if s in WORK[work]
        else None
        for s in ORDER
    ]
    seeds, positions = torch.arange(rows, device=DEVICE), torch.full((rows,), 100, device=DEVICE)
    counts = in_prompt = None
    if "every" in work:
        counts = torch.randint(-20, 3, shape, device=DEVICE, generator=generator).clamp(min=0).int()
        in_prompt = torch.rand(shape, device=DEVICE, generator=generator) < 0.01
    named = dict(zip(ORDER, settings, strict=True))

    def ours(*_):
        return sample(logits, seeds=seeds, positions=positions, counts=counts, in_prompt=in_prompt, **named)

    op = chosen(impl, ours, sample_reference)
    return lambda: op(logits, seeds, positions, *settings, counts, in_prompt)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("work", WORK)
def test_sample(benchmark, work, shape, impl):
    ids, expected = make(impl, work, shape)()[0], make("eager", work, shape)()[0]
    # Where two tokens are level to the last bit of exp or log, another compiler's choice is as good.
    assert (ids == expected).float().mean() >= (0.95 if shape[0] > 1 else 1)
    benchmark.group = f"sample, {work}, {shape[0]} x {shape[1]}"
    per_logit = DTYPE.itemsize + (5 if "every" in work else 0)  # counts and the prompt's ids
    measure(benchmark, lambda: make(impl, work, shape), shape[0] * shape[1] * per_logit, shape)
