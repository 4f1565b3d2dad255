"""What a training step computes beside its products, on CPU tensors through the C library: the CPU implementation of
the torch.library ops of rms_norm, rope, swiglu and varlen_attention and of their backward passes.

Each reads its operands once and writes its result once, where torch makes a pass over memory an operation; attention's
score matrices never exist.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from llava_kernels.dispatch import chosen
from llava_kernels.native import available, dense, handle

LEAST = 1 << 15  # values from which on a call of the library costs less than it saves


class RmsNormArgs(Structure):
    """lk_rms_norm_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("rows", "width")],
        ("eps", c_float),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        *[(name, c_void_p) for name in ("weight", "out", "sum", "rstd")],
    ]


class RmsNormBackwardArgs(Structure):
    """lk_rms_norm_backward_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("rows", "width")],
        ("d_out", c_void_p),
        ("d_out_stride", c_int64),
        ("d_sum", c_void_p),
        ("d_sum_stride", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        *[(name, c_void_p) for name in ("weight", "rstd", "d_x", "d_weight")],
    ]


class RopeArgs(Structure):
    """lk_rope_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("tokens", "heads", "head_dim")],
        ("x", c_void_p),
        *[(name, c_int64) for name in ("x_token_stride", "x_head_stride")],
        *[(name, c_void_p) for name in ("cos", "sin", "out")],
        *[(name, c_int64) for name in ("out_token_stride", "out_head_stride")],
        ("inverse", c_int),
    ]


class SwigluArgs(Structure):
    """lk_swiglu_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("rows", "inner")],
        ("gate_up", c_void_p),
        ("gate_up_stride", c_int64),
        ("out", c_void_p),
    ]


class SwigluBackwardArgs(Structure):
    """lk_swiglu_backward_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("rows", "inner")],
        ("d_out", c_void_p),
        ("d_out_stride", c_int64),
        ("gate_up", c_void_p),
        ("gate_up_stride", c_int64),
        ("d_gate_up", c_void_p),
    ]


class VarlenAttentionArgs(Structure):
    """lk_varlen_attention_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("tokens", "sequences", "heads", "kv_heads", "head_dim")],
        ("causal", c_int),
        ("q", c_void_p),
        *[(name, c_int64) for name in ("q_token_stride", "q_head_stride")],
        *[(name, c_void_p) for name in ("k", "v")],
        *[(name, c_int64) for name in ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")],
        *[(name, c_void_p) for name in ("cu_seqlens", "out", "lse")],
    ]


class VarlenAttentionBackwardArgs(Structure):
    """lk_varlen_attention_backward_args."""

    _fields_ = [
        ("forward", VarlenAttentionArgs),
        ("d_out", c_void_p),
        *[(name, c_int64) for name in ("d_out_token_stride", "d_out_head_stride")],
        *[(name, c_void_p) for name in ("dq", "dk", "dv")],
    ]


def takes(*tensors: Tensor) -> bool:
    """Whether the op that is about to run on ``tensors``, the first its largest, goes to the C library."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == first.dtype for t in tensors)
        and first.numel() >= LEAST
        and chosen() in ("auto", "native")
        and available()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, rstd = _norm(x, None, weight, eps)
    return normed, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normed, total, rstd = _norm(x, residual, weight, eps)
    assert total is not None
    return normed, total, rstd


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    out, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if residual is None else x.new_empty(x.shape)
    rows, weight = _rows(x), weight.contiguous()
    more = None if residual is None else _rows(residual)
    args = RmsNormArgs(
        _dtype(x), *rows.shape, eps, rows.data_ptr(), rows.stride(0), _at(more), 0 if more is None else more.stride(0),
        weight.data_ptr(), out.data_ptr(), _at(total), rstd.data_ptr(),
    )  # fmt: skip
    lk = handle()
    lk.check(lk.library.lk_rms_norm(lk._handle, byref(args), None))
    return out, total, rstd


def rms_norm_backward(
    d_out: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    d_x = x.new_empty(x.shape if needs_x else 0)
    d_weight = x.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32)
    rows, d_rows, weight = _rows(x), _rows(d_out), weight.contiguous()
    more = None if d_sum is None else _rows(d_sum)
    args = RmsNormBackwardArgs(
        _dtype(x), *rows.shape, d_rows.data_ptr(), d_rows.stride(0), _at(more), 0 if more is None else more.stride(0),
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), rstd.data_ptr(), _at(d_x if needs_x else None),
        _at(d_weight if needs_weight else None),
    )  # fmt: skip
    lk = handle()
    lk.check(lk.library.lk_rms_norm_backward(lk._handle, byref(args)))
    return d_x, d_weight.to(weight.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    out = x.new_empty(x.shape)
    _turn(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, out, inverse)
    return out


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.stride(-1) == 1:
        _turn(x, cos, sin, x, False)
    else:
        x.copy_(rope(x, cos, sin, False))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool) -> None:
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    args = RopeArgs(
        _dtype(x), *x.shape, x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
        out.stride(0), out.stride(1), inverse,
    )  # fmt: skip
    lk = handle()
    lk.check(lk.library.lk_rope(lk._handle, byref(args), None))


def swiglu(gate_up: Tensor) -> Tensor:
    inner = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], inner)
    rows = _rows(gate_up)
    args = SwigluArgs(_dtype(rows), len(rows), inner, rows.data_ptr(), rows.stride(0), out.data_ptr())
    lk = handle()
    lk.check(lk.library.lk_swiglu(lk._handle, byref(args), None))
    return out


def swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    d_gate_up = gate_up.new_empty(gate_up.shape)
    rows, d_rows = _rows(gate_up), _rows(d_out)
    args = SwigluBackwardArgs(
        _dtype(rows), len(rows), rows.shape[1] // 2, d_rows.data_ptr(), d_rows.stride(0), rows.data_ptr(),
        rows.stride(0), d_gate_up.data_ptr(),
    )  # fmt: skip
    lk = handle()
    lk.check(lk.library.lk_swiglu_backward(lk._handle, byref(args)))
    return d_gate_up


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    q, k, v = dense(q), dense(k), dense(v)
    args = _attention(q, k, v, cu_seqlens, out, lse, causal)
    lk = handle()
    lk.check(lk.library.lk_varlen_attention(lk._handle, byref(args)))
    return out, lse


def varlen_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    want_q: bool,
    want_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = q.new_empty(q.shape if want_q else (0,))
    dk, dv = (q.new_empty(k.shape if want_kv else (0,)) for _ in range(2))
    d_out, q, k, v = dense(d_out), dense(q), dense(k), dense(v)
    args = VarlenAttentionBackwardArgs(
        _attention(q, k, v, cu_seqlens, out, lse, causal), d_out.data_ptr(), d_out.stride(0), d_out.stride(1),
        _at(dq if want_q else None), _at(dk if want_kv else None), _at(dv if want_kv else None),
    )  # fmt: skip
    lk = handle()
    lk.check(lk.library.lk_varlen_attention_backward(lk._handle, byref(args)))
    return dq, dk, dv


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> VarlenAttentionArgs:
    return VarlenAttentionArgs(
        _dtype(q), q.shape[0], len(cu_seqlens) - 1, q.shape[1], k.shape[1], q.shape[2], causal, q.data_ptr(),
        q.stride(0), q.stride(1), k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        cu_seqlens.data_ptr(), out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip


def _dtype(x: Tensor) -> int:
    from llava_kernels import library  # knows the package, whose operations know this module

    return library.DTYPES[x.dtype]


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (T, D), its rows contiguous and at one distance."""
    x = x.reshape(-1, x.shape[-1])
    return dense(x)
