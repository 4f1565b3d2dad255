"""varlen_attention on CPUs through the C library: all sequences and heads in one call, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_kernels import native, native_training
from llava_kernels.attention.backend import Backend, on_device


def attend(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    return _forward(q, k, v, on_device(seqlens, cu_seqlens, q.device), causal)[0]


def load() -> None:
    if not native.available():
        raise ImportError("libllava_kernels was not built with this package")


def unfit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"needs a CPU, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > native.MAX_HEAD_DIM:
        return f"takes head sizes up to {native.MAX_HEAD_DIM}, not {head_dim}"
    return None


INSTALL = "pip install --force-reinstall llava-fast, where a C++ compiler is"
NATIVE = Backend(attend=attend, unfit=unfit, load=load, install=INSTALL)


@torch.library.custom_op("llava_kernels::native_varlen_attention", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse (heads, T) float32)."""
    return native_training.varlen_attention(q, k, v, cu_seqlens, causal)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("llava_kernels::native_varlen_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
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
    """(dq, dk, dv); of what is not wanted, an empty tensor."""
    return native_training.varlen_attention_backward(d_out, q, k, v, out, lse, cu_seqlens, causal, want_q, want_kv)


@_backward.register_fake
def _(
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
    dk = q.new_empty(k.shape if want_kv else (0,))
    return q.new_empty(q.shape if want_q else (0,)), dk, torch.empty_like(dk)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, ends)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    want_q, want_k, want_v = ctx.needs_input_grad[:3]
    dq, dk, dv = _backward(d_out, *ctx.saved_tensors, ctx.causal, want_q, want_k or want_v)
    return dq if want_q else None, dk if want_k else None, dv if want_v else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
