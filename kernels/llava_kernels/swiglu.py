"""swiglu: the gated activation of LLaMA's feed-forward layer (Shazeer, 2020)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native, native_training
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` on the merged product; the kernel computes in float32 and rounds once.

    Args:
        gate_up: (..., 2F), gate first. Its rows may lie at any distance. It alone is kept for the backward pass.

    Returns:
        (..., F) in the same dtype.

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up of shape {tuple(gate_up.shape)} has no two halves")
    if use_triton(gate_up) or native_training.takes(gate_up):
        return torch.ops.llava_kernels.swiglu(gate_up)
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _swiglu_forward_kernel(
    gate_up_ptr,  # (T, 2 * inner)
    out_ptr,  # (T, inner)
    stride,  # of gate_up's rows
    inner,
    BLOCK: tl.constexpr,
):
    """A program makes BLOCK values of one row; programs of a row stand side by side."""
    blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + inner + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * inner + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    d_out_ptr,  # (T, inner)
    gate_up_ptr,  # (T, 2 * inner)
    d_gate_up_ptr,  # (T, 2 * inner)
    d_out_stride,
    stride,
    inner,
    BLOCK: tl.constexpr,
):
    """Programs as in the forward pass; each writes its piece of both halves."""
    blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    d_out = tl.load(d_out_ptr + row * d_out_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + inner + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_out * gate * sigmoid
    to = d_gate_up_ptr + row * 2 * inner + columns
    tl.store(to, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(to + inner, d_up.to(d_gate_up_ptr.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """(..., N) -> (T, N) with the last dimension contiguous; no copy where rows already lie at one distance."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(gate_up: Tensor) -> Tensor:
    inner = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], inner)
    if out.numel() == 0:
        return out
    gate_up = _rows(gate_up)
    blocks = blocks_for("swiglu", gate_up.device, inner)
    grid = (len(gate_up) * triton.cdiv(inner, blocks["BLOCK"]),)
    with torch.cuda.device_of(gate_up):
        _swiglu_forward_kernel[grid](gate_up, out, gate_up.stride(0), inner, **blocks)
    return out


def _backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    d_gate_up = gate_up.new_empty(gate_up.shape)
    if d_gate_up.numel() == 0:
        return d_gate_up
    inner = gate_up.shape[-1] // 2
    gate_up, d_out = _rows(gate_up), _rows(d_out)
    blocks = blocks_for("swiglu", gate_up.device, inner)
    grid = (len(gate_up) * triton.cdiv(inner, blocks["BLOCK"]),)
    with torch.cuda.device_of(gate_up):
        _swiglu_backward_kernel[grid](d_out, gate_up, d_gate_up, d_out.stride(0), gate_up.stride(0), inner, **blocks)
    return d_gate_up


@torch.library.custom_op("llava_kernels::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    return _forward(gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("llava_kernels::swiglu_backward", mutates_args=())
def _swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return _backward(d_out, gate_up)


@_swiglu_backward.register_fake
def _(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_out: Tensor) -> Tensor:
    return torch.ops.llava_kernels.swiglu_backward(d_out, *ctx.saved_tensors)


native.runs_on_cpu(_swiglu, native_training.swiglu)
native.runs_on_cpu(_swiglu_backward, native_training.swiglu_backward)
_swiglu.register_autograd(_differentiate, setup_context=_save)


def builds(arch: int) -> list[Build]:
    """Forward and backward; the size is an argument of the kernels, so LLaVA 7B and 13B run the same code."""
    kernels = {"swiglu_forward": _swiglu_forward_kernel, "swiglu_backward": _swiglu_backward_kernel}
    return [_build(name, kernel, blocks_on("swiglu", arch, 11008)) for name, kernel in kernels.items()]


def _build(name: str, kernel: Any, blocks: dict[str, int]) -> Build:
    num_warps = blocks.pop("num_warps")
    return Build(
        name=f"{name}_bf16",
        kernel=kernel,
        signature={n: "*bf16" if n.endswith("_ptr") else "i32" for n in kernel.arg_names if not n.isupper()},
        constants=blocks,
        num_warps=num_warps,
        kind="memory",
    )


def candidates(arch: int) -> list[dict[str, int]]:
    """Block sizes to time for the forward pass."""
    return [{"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8)]


def tuning_case(inner: int, device: torch.device) -> Callable[[], Any]:
    gate_up = torch.randn(1 << 13, 2 * inner, device=device, dtype=torch.bfloat16)
    return lambda: swiglu(gate_up)
