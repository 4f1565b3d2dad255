"""linear against float64, on whatever processor this is and as if it had no 16-bit products."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from llava_kernels import linear

module = importlib.import_module("llava_kernels.linear")


@pytest.fixture(params=[True, False], ids=["half products", "none"])
def processor(request, monkeypatch):
    monkeypatch.setattr(module, "_has_half_products", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (5, 64), (6, 64), (3, 7, 65), (70, 3000)])
@pytest.mark.parametrize("bias", [True, False])
def test_no_further_from_float64_than_torch(processor, dtype, shape, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(301, shape[-1], generator=generator).to(dtype)
    b = torch.randn(301, generator=generator).to(dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    ours, torchs = linear(x, weight, b), F.linear(x, weight, b)
    assert ours.shape == torchs.shape and ours.dtype == dtype
    error = lambda y: (y.double() - exact).abs().max() if y.numel() else torch.tensor(0.0)  # noqa: E731
    assert error(ours) <= 2 * error(torchs) + 1e-12


def test_many_rows_are_multiplied_in_float32_without_half_products(monkeypatch):
    """Sums of 16-bit products lose nothing before the last rounding: half a unit of the last place, and what sums in
    float32 may be off (a sum that is rounded in between is off by far more)."""
    monkeypatch.setattr(module, "_has_half_products", lambda: False)
    x, weight = torch.randn(9, 4000).bfloat16(), torch.randn(600, 4000).bfloat16()
    exact = F.linear(x.double(), weight.double())
    half_a_unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
    off = (linear(x, weight).double() - exact).abs()
    assert (off <= half_a_unit + 1e-4).all()
    halves = F.linear(x[:, :2000], weight[:, :2000]) + F.linear(x[:, 2000:], weight[:, 2000:])
    assert not ((halves.double() - exact).abs() <= half_a_unit + 1e-4).all()


def test_gradients_are_torchs(processor):
    x = torch.randn(20, 30, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 30, dtype=torch.bfloat16, requires_grad=True)
    linear(x, weight).sum().backward()
    ours = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    F.linear(x, weight).sum().backward()
    assert torch.equal(ours[0], x.grad) and torch.equal(ours[1], weight.grad)
