"""The operations of a training step on CPU tensors through the C library, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llava_kernels as lk
from llava_kernels import library, native_training, rms_norm, rope, swiglu
from llava_kernels.attention.native_varlen import _backward, _forward
from llava_kernels.rms_norm import rms_norm_reference
from llava_kernels.rope import rope_reference
from llava_kernels.swiglu import swiglu_reference

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
widths = pytest.mark.parametrize("width", [2, 34, 256, 1030])
EPS = 1e-5


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(native_training, "LEAST", 1)
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of :mod:`llava_kernels.native_training` that ran."""
    seen, handle = [], native_training.handle

    class Spy:
        def __init__(self, of):
            self.check, self._handle, self.library = of.check, of._handle, self
            self.of = of.library

        def __getattr__(self, name):
            seen.append(name)
            return getattr(self.of, name)

    monkeypatch.setattr(native_training, "handle", lambda: Spy(handle()))
    return seen


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope_reference(x.double(), cos.double(), sin.double())


def exact_swiglu(gate_up: Tensor) -> Tensor:
    return swiglu_reference(gate_up.double())


def results(function, inputs: list[Tensor], d_outs: list[Tensor]) -> list[Tensor]:
    """What comes out, and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gradients = torch.autograd.grad(outs, inputs, [d.to(o.dtype) for d, o in zip(d_outs, outs, strict=True)])
    return [*outs, *gradients]


def check(native, torchs, exact, inputs: list[Tensor], d_outs: list[Tensor]) -> None:
    """Errors are at most three times those of plain torch, and some roundings where torch is exact."""
    found = results(native, inputs, d_outs)
    plain = results(torchs, inputs, d_outs)
    expected = results(exact, [x.double() for x in inputs], d_outs)
    for mine, theirs, true in zip(found, plain, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        error, torch_error = ((a.double() - true).abs().max().item() for a in (mine, theirs))
        assert error <= 3 * torch_error + 2 * torch.finfo(mine.dtype).eps * max(1, true.abs().max().item())


@dtypes
@widths
def test_swiglu(width, dtype, calls):
    gate_up = 3 * torch.randn(3, 5, 2 * width, dtype=dtype)
    check(swiglu, swiglu_reference, exact_swiglu, [gate_up], [torch.randn(3, 5, width, dtype=dtype)])
    assert calls == ["lk_swiglu", "lk_swiglu_backward"]


@dtypes
@widths
def test_rms_norm(width, dtype, calls):
    x, weight = torch.randn(300, width, dtype=dtype), torch.randn(width, dtype=dtype)
    for rows in (1, 300):  # a gradient of the weight that one task sums, and several
        check(
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, w: rms_norm_reference(x, w, EPS),
            exact_norm,
            [x[:rows], weight],
            [torch.randn(rows, width, dtype=dtype)],
        )
    assert calls == ["lk_rms_norm", "lk_rms_norm_backward"] * 2


@dtypes
@widths
def test_add_rms_norm(width, dtype, calls):
    x, residual = (torch.randn(2, 7, width, dtype=dtype) for _ in range(2))
    check(
        lambda *a: lk.add_rms_norm(*a, EPS),
        lambda x, r, w: (rms_norm_reference(x + r, w, EPS), x + r),
        lambda x, r, w: (exact_norm(x + r, w), x + r),
        [x, residual, torch.randn(width, dtype=dtype)],
        [torch.randn(2, 7, width, dtype=dtype) for _ in range(2)],
    )
    assert calls == ["lk_rms_norm", "lk_rms_norm_backward"]


@dtypes
@pytest.mark.parametrize("head_dim", [2, 30, 128, 1030])
def test_rope(head_dim, dtype, calls):
    angles = 10 * torch.randn(9, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(9, 5, head_dim, dtype=dtype)
    check(
        lambda x: rope(x[:, :3], cos, sin),
        lambda x: rope_reference(x[:, :3], cos, sin),
        lambda x: exact_rope(x[:, :3], cos, sin),
        [qkv],
        [torch.randn(9, 3, head_dim, dtype=dtype)],
    )
    assert calls == ["lk_rope"] * 2
    expected = rope(qkv, cos, sin)
    assert torch.equal(lk.rope_(qkv, cos, sin), expected) and torch.equal(qkv, expected)


def test_strides(calls):
    """Rows that lie apart, rows that are one, and gradients that are one number."""
    wide = torch.randn(6, 40)
    for x in (wide[:, 4:36], wide.T.contiguous().T[:, :32], wide[:1, :32].expand(6, 32)):
        leaf = x.detach().requires_grad_()
        out = swiglu(leaf)
        torch.testing.assert_close(out, swiglu_reference(x))
        (found,) = torch.autograd.grad(out.sum(), leaf)
        (expected,) = torch.autograd.grad(swiglu_reference(leaf).sum(), leaf)
        torch.testing.assert_close(found, expected)
        weight = torch.randn(32)
        torch.testing.assert_close(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))
    assert len(calls) == 9


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(trained):
    inputs = {"x": torch.randn(5, 16), "weight": torch.randn(16)}
    inputs[trained].requires_grad_()
    rms_norm(inputs["x"], inputs["weight"], EPS).square().sum().backward()
    expected = inputs[trained].grad.clone()
    inputs[trained].grad = None
    rms_norm_reference(inputs["x"], inputs["weight"], EPS).square().sum().backward()
    torch.testing.assert_close(expected, inputs[trained].grad)


def test_who_goes_there(monkeypatch, calls):
    monkeypatch.setattr(native_training, "LEAST", 100)
    gate_up = torch.randn(10, 10)
    swiglu(gate_up[:9]), swiglu(gate_up.double()), swiglu(gate_up.half())  # few values, and other types
    rms_norm(gate_up.bfloat16(), torch.ones(10), EPS)  # a weight of another type
    for other in ("reference", "triton"):
        with lk.implementation(other):
            swiglu(gate_up)
    assert calls == []
    swiglu(gate_up)
    with lk.implementation("native"):
        swiglu(gate_up)
    assert calls == ["lk_swiglu"] * 2


def test_no_rows():
    for x in (torch.empty(0, 8, requires_grad=True), torch.empty(3, 0, 8, requires_grad=True)):
        native_training.swiglu(x.detach())
        torch.ops.llava_kernels.rms_norm(x, torch.ones(8), EPS)[0].sum().backward()
        assert x.grad.shape == x.shape


def test_threads_change_nothing():
    """Not one bit: who sums what does not depend on how many there are."""
    x, weight = torch.randn(700, 96), torch.randn(96)
    qkv = torch.randn(300, 3, 4, 32)
    ends, before = torch.tensor([0, 250, 300], dtype=torch.int32), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            norm = results(lambda x, w: rms_norm(x, w, EPS), [x, weight], [x.cos()])
            attended = results(lambda x: _forward(*x.unbind(1), ends, True)[0], [qkv], [qkv[:, 0].cos()])
            made.append([*norm, *attended])
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], others, strict=True))


def test_opcheck():
    """Shapes that fake tensors promise, and gradients under torch.compile's tracing."""
    ops, check = torch.ops.llava_kernels, torch.library.opcheck
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    check(ops.swiglu.default, (x,))
    check(ops.rms_norm.default, (x, weight, EPS))
    check(ops.add_rms_norm.default, (x, torch.randn(3, 8), weight, EPS))
    angles = torch.randn(3, 2)
    check(ops.rope.default, (x.detach().view(3, 2, 4), angles.cos(), angles.sin(), False))
    qkv = [torch.randn(9, n, 16, requires_grad=True) for n in (2, 1, 1)]
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    check(_forward._opoverload, (*qkv, ends, True))
    out, lse = (t.detach() for t in _forward(*qkv, ends, True))
    given = (out, *(t.detach() for t in qkv), out, lse, ends, True)
    for wanted in ((True, True), (False, True), (True, False)):
        check(_backward._opoverload, (*given, *wanted), test_utils="test_faketensor")


def test_attention_of_what_is_frozen():
    q, k, v = (torch.randn(70, 2, 16) for _ in range(3))
    d_out, ends = torch.randn(70, 2, 16), torch.tensor([0, 70], dtype=torch.int32)
    out, lse = _forward(q, k, v, ends, True)
    whole = _backward(d_out, q, k, v, out, lse, ends, True, True, True)
    dq, nothing, _ = _backward(d_out, q, k, v, out, lse, ends, True, True, False)
    assert torch.equal(dq, whole[0]) and not nothing.numel()
    nothing, dk, dv = _backward(d_out, q, k, v, out, lse, ends, True, False, True)
    assert torch.equal(dk, whole[1]) and torch.equal(dv, whole[2]) and not nothing.numel()


def test_lengths_that_do_not_fit_are_refused():
    q = torch.randn(9, 2, 16)
    with pytest.raises(library.LibraryError, match="do not cover the 9 tokens"):
        _forward(q, q, q, torch.tensor([0, 8], dtype=torch.int32), True)
