"""Master weights, float32 accumulation and the schedule, against torch's own AdamW and the schedule's formula."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from llava_fast.errors import ConfigError
from llava_fast.train.optimizer import MasterAdamW, cosine


def problem(dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(8, 8).to(dtype), torch.randn(16, 8).to(dtype)


def test_float32_is_torchs_adamw():
    (ours, x), (theirs, _) = problem(torch.float32), problem(torch.float32)
    optimizer = MasterAdamW(ours.named_parameters(), lr=0.01, grad_clip=0.0)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(5):
        ours(x).square().mean().backward()
        norm = optimizer.step(1.0)
        theirs(x).square().mean().backward()
        expected = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_bfloat16_accumulates_what_bfloat16_would_lose():
    """256 gradients of 1 and then 64 of 2^-9 of that: a bfloat16 sum stays where it was, the float32 one does not."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("p", p)], lr=1.0)
    for _ in range(256):
        p.sum().backward()
    for _ in range(64):
        (p * 2**-9).sum().backward()
    assert p.grad is None
    assert optimizer.sums["p"].tolist() == [256 + 64 * 2**-9] * 4
    assert (torch.tensor(256.0).bfloat16() + torch.tensor(2**-9).bfloat16()).item() == 256


def test_bfloat16_steps_too_small_for_it_add_up_in_the_master():
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("p", p)], lr=1e-4)
    for _ in range(100):
        p.sum().backward()
        optimizer.step(1.0)
    assert optimizer.masters["p"].item() == pytest.approx(1 - 100e-4, abs=1e-5)
    assert p.item() == optimizer.masters["p"].bfloat16().item() < 1


def test_projector_rate_and_decay_of_matrices_only():
    named = {
        "projector.linear_1.weight": nn.Parameter(torch.ones(2, 2)),
        "decoder.out.weight": nn.Parameter(torch.ones(2, 2)),
        "decoder.norm.weight": nn.Parameter(torch.ones(2)),
    }
    optimizer = MasterAdamW(named.items(), lr=0.1, projector_lr=0.5, weight_decay=0.2)
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)  # no gradient: only the decay moves, by lr * decay
    assert named["projector.linear_1.weight"][0, 0].item() == pytest.approx(1 - 0.25 * 0.2)
    assert named["decoder.out.weight"][0, 0].item() == pytest.approx(1 - 0.05 * 0.2)
    assert named["decoder.norm.weight"].tolist() == [1, 1]


def test_clipping():
    p = nn.Parameter(torch.zeros(4))
    optimizer = MasterAdamW([("p", p)], lr=0.0, grad_clip=1.0)
    p.grad = torch.full((4,), 5.0)
    assert optimizer.step(1.0).item() == 10.0  # the norm before clipping
    torch.testing.assert_close(optimizer.adam.state[p]["exp_avg"], torch.full((4,), 0.05))  # (1 - 0.9) * 5 / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit(dtype):
    def steps(model, optimizer, x, n):
        for _ in range(n):
            model(x).float().square().mean().backward()
            optimizer.step(1.0)

    (a, x), (b, _) = problem(dtype), problem(dtype)
    whole, half = (MasterAdamW(m.named_parameters(), lr=0.01) for m in (a, b))
    steps(a, whole, x, 6)
    steps(b, half, x, 3)
    state = {k: v.clone() for k, v in half.state().items()}
    c, _ = problem(dtype)
    rest = MasterAdamW(c.named_parameters(), lr=0.01)
    rest.load(state)
    steps(c, rest, x, 3)
    assert torch.equal(a.weight, c.weight)
    assert torch.equal(whole.masters["weight"], rest.masters["weight"])


def test_schedule():
    rates = [cosine(i, 1000, 0.03) for i in range(1000)]
    assert rates[0] == pytest.approx(1 / 31)
    assert rates[30] == max(rates) == 1.0
    assert all(a < b for a, b in pairwise(rates[:31]))
    assert all(a > b for a, b in pairwise(rates[30:]))
    assert rates[515] == pytest.approx(0.5)  # half way down
    assert rates[999] == pytest.approx((1 + math.cos(math.pi * 969 / 970)) / 2)
    assert cosine(0, 1, 0.0) == 1.0


# ---- moments in 8 bits, and on the host


@pytest.fixture
def eager():
    """torchao compiles its step; the same arithmetic without."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


def wide_problem(dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(64, 128).to(dtype), torch.randn(16, 64).to(dtype)  # 8192 weights: as many as are put in 8 bits


def descend(model: nn.Linear, optimizer: MasterAdamW, x: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        (model(x).float() - 1).square().mean().backward()
        optimizer.step(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_host_it_is_the_same_step(dtype):
    (a, x), (b, _) = wide_problem(dtype), wide_problem(dtype)
    for model, kind in ((a, "adamw"), (b, "adamw-offload")):
        optimizer = MasterAdamW(model.named_parameters(), lr=0.01, weight_decay=0.1, kind=kind)
        descend(model, optimizer, x, 5)
    assert torch.equal(a.weight, b.weight)
    assert all(m is not p for m, p in zip(optimizer.masters.values(), b.parameters(), strict=True))
    assert all(p.grad is None for p in b.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_follow_32(dtype, eager):
    (a, x), (b, _) = wide_problem(dtype), wide_problem(dtype)
    start = a.weight.detach().clone()
    for model, kind in ((a, "adamw"), (b, "adamw-8bit")):
        optimizer = MasterAdamW(model.named_parameters(), lr=0.003, kind=kind)
        descend(model, optimizer, x, 20)
    moved = (a.weight - start).float().norm()
    assert 0 < (a.weight - b.weight).float().norm() < 0.1 * moved
    moments = optimizer.adam.state[optimizer.masters["weight"]]
    assert moments["exp_avg"].codes.dtype == torch.uint8
    assert moments["exp_avg"].codes.numel() == 8192
    assert optimizer.adam.state[optimizer.masters["bias"]]["exp_avg"].dtype == torch.float32


def test_on_the_host_it_goes_on_bit_for_bit():
    models = [wide_problem(torch.bfloat16)[0] for _ in range(3)]
    _, x = wide_problem(torch.bfloat16)
    whole, half, rest = (MasterAdamW(m.named_parameters(), lr=0.01, kind="adamw-offload") for m in models)
    descend(models[0], whole, x, 6)
    descend(models[1], half, x, 3)
    rest.load({k: v.clone() for k, v in half.state().items()})
    descend(models[2], rest, x, 3)
    assert torch.equal(whole.masters["weight"], rest.masters["weight"])
    assert torch.equal(models[0].weight, models[2].weight)


def test_8_bits_are_kept_in_float32_and_rounded_again(eager):
    (a, x), (b, _) = wide_problem(torch.float32), wide_problem(torch.float32)
    first, second = (MasterAdamW(m.named_parameters(), lr=0.01, kind="adamw-8bit") for m in (a, b))
    descend(a, first, x, 3)
    state = {k: v.clone() for k, v in first.state().items()}
    assert {v.dtype for v in state.values()} == {torch.float32}
    second.load(state)
    again = second.state()
    for name in state:
        exact = name.startswith(("weight.", "step.")) or name.endswith(".bias")
        bound = 0 if exact else 0.015 * state[name].abs().max().item()
        torch.testing.assert_close(again[name], state[name], rtol=0, atol=bound, msg=name)
    assert second.adam.state[b.weight]["exp_avg_sq"].codes.dtype == torch.uint8
    for _ in range(3):
        for model, optimizer in ((a, first), (b, second)):
            descend(model, optimizer, x, 1)
    torch.testing.assert_close(b.weight, a.weight, rtol=0, atol=0.003)  # a tenth of three steps


def test_a_run_goes_on_with_another_kind(eager):
    (a, x), (b, _), (c, _) = (wide_problem(torch.float32) for _ in range(3))
    first = MasterAdamW(a.named_parameters(), lr=0.01)
    descend(a, first, x, 3)
    state = {k: v.clone() for k, v in first.state().items()}
    host, eight = (
        MasterAdamW(m.named_parameters(), lr=0.01, kind=k) for m, k in ((b, "adamw-offload"), (c, "adamw-8bit"))
    )
    for model, optimizer in ((b, host), (c, eight)):
        optimizer.load(state)
        descend(model, optimizer, x, 2)
    descend(a, first, x, 2)
    assert torch.equal(a.weight, b.weight)
    moved = (a.weight - wide_problem(torch.float32)[0].weight).norm()
    assert 0 < (c.weight - a.weight).norm() < 0.1 * moved


def test_rates_reach_both(eager):
    for kind in ("adamw", "adamw-8bit", "adamw-offload"):
        p = nn.Parameter(torch.ones(4))
        optimizer = MasterAdamW([("p", p)], lr=0.1, weight_decay=0.0, grad_clip=0.0, kind=kind)
        p.grad = torch.ones(4)
        optimizer.step(0.5)  # the first step of Adam is as long as the rate
        torch.testing.assert_close(p.detach(), torch.full((4,), 0.95))
        p.grad = torch.ones(4)
        optimizer.step(0.25)
        torch.testing.assert_close(p.detach(), torch.full((4,), 0.925))


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"adamw-8bit needs torchao; pip install llava-fast\[torchao\]"):
        MasterAdamW([("p", nn.Parameter(torch.ones(4)))], lr=0.1, kind="adamw-8bit")
