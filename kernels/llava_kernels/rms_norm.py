"""rms_norm, add_rms_norm: root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019)."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native, native_training
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight``: statistics in float32, ``x / rms(x)`` rounded to x's dtype before the weight is applied.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean of the squares.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: ``weight`` is not (D,).
    """
    _check(x, weight)
    if use_triton(x) or native_training.takes(x, weight):
        return torch.ops.llava_kernels.rms_norm(x, weight, eps)[0]
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual addition and the norm that follows it, in one pass over the data.

    Args:
        x, residual: (..., D), of one dtype.
        weight: (D,).
        eps: added to the mean of the squares.

    Returns:
        ``rms_norm(sum, weight, eps)`` and ``sum = x + residual``, both of x's shape and dtype.

    Raises:
        ValueError: ``weight`` is not (D,), or ``residual`` differs from ``x`` in shape or dtype.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}; they must agree"
        )
    if use_triton(x) or native_training.takes(x, weight):
        normed, total, _ = torch.ops.llava_kernels.add_rms_norm(x, residual, weight, eps)
        return normed, total
    return add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (weight * h.to(x.dtype)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, and x of shape {tuple(x.shape)} needs ({x.shape[-1]},)")


@triton.jit(do_not_specialize=["tokens"])
def _rms_norm_forward_kernel(
    x_ptr,  # (tokens, dim)
    residual_ptr,  # (tokens, dim), or None
    weight_ptr,  # (dim,)
    out_ptr,  # (tokens, dim)
    sum_ptr,  # (tokens, dim), or None without a residual
    rstd_ptr,  # (tokens,) float32, or None where no backward pass follows
    x_stride,
    residual_stride,
    tokens,
    dim,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program norms ROWS rows, each held whole in registers: BLOCK >= dim."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < tokens) & (columns < dim)
    weight = tl.load(weight_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + rows * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * dim + columns, total, mask=inside)
        x = total.to(tl.float32)  # what is normed is what the next layer gets, rounding included
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)  # (ROWS, 1)
    normed = (x * rstd).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + rows * dim + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _rms_norm_backward_kernel(
    d_out_ptr,  # (tokens, dim)
    d_sum_ptr,  # (tokens, dim) further gradient of x, or None
    x_ptr,  # (tokens, dim) what was normed
    weight_ptr,  # (dim,)
    rstd_ptr,  # (tokens,) float32
    d_x_ptr,  # (tokens, dim), or None when x is frozen
    partial_ptr,  # (programs, dim) float32, or None when the weight is frozen
    d_out_stride,
    d_sum_stride,
    x_stride,
    tokens,
    dim,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With h = x * rstd, g = d_out * weight: d_x = rstd * (g - h * mean(g * h)) + d_sum, d_weight = sum of d_out * h.

    A program takes every num_programs-th group of ROWS rows and keeps its part of d_weight in registers. With more
    than one stage the rows of later rounds are on their way while this round's are summed.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, tokens, step, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (rows < tokens) & (columns < dim)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + rows * d_out_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < tokens, other=0.0)  # (ROWS, 1)
        if d_sum_ptr is not None:  # now, not once the other loads have been waited for
            d_sum = tl.load(d_sum_ptr + rows * d_sum_stride + columns, mask=inside, other=0.0)
        h = x * rstd
        if partial_ptr is not None:
            # The weight multiplied the rounded h.
            d_weight += d_out * h.to(x_ptr.dtype.element_ty).to(tl.float32)
        if d_x_ptr is not None:
            g = d_out * weight
            d_x = rstd * (g - h * (tl.sum(g * h, axis=1, keep_dims=True) / dim))
            if d_sum_ptr is not None:
                d_x += d_sum.to(tl.float32)
            tl.store(d_x_ptr + rows * dim + columns, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        column = tl.arange(0, BLOCK)
        to = partial_ptr + tl.program_id(0).to(tl.int64) * dim + column
        tl.store(to, tl.sum(d_weight, axis=0), mask=column < dim)


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (T, D) with the last dimension contiguous; no copy where rows already lie at one distance."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    out, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if residual is None else torch.empty_like(out)
    if x.numel() == 0:
        return out, total, rstd
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    tokens, dim = x.shape
    blocks = blocks_for("rms_norm", x.device, dim)
    with torch.cuda.device_of(x):
        _rms_norm_forward_kernel[(triton.cdiv(tokens, blocks["ROWS"]),)](
            x,
            residual,
            weight.contiguous(),
            out,
            total,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            tokens,
            dim,
            eps,
            BLOCK=triton.next_power_of_2(dim),
            **blocks,
        )
    return out, total, rstd


def _backward(
    d_out: Tensor,
    d_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    d_x = x.new_empty(x.shape if needs_x else 0)
    if x.numel() == 0:
        return d_x, weight.new_zeros(weight.shape if needs_weight else 0)
    x, d_out = _rows(x), _rows(d_out)
    d_sum = None if d_sum is None else _rows(d_sum)
    tokens, dim = x.shape
    if needs_weight:
        blocks = blocks_for("rms_norm_backward_weight", x.device, dim * x.element_size())
        programs = min(
            triton.cdiv(tokens, blocks["ROWS"]), blocks.pop("programs_per_processor") * _processors(x.device)
        )
        partial = x.new_empty(programs, dim, dtype=torch.float32)
    else:
        blocks = blocks_for("rms_norm_backward", x.device, dim)
        programs, partial = triton.cdiv(tokens, blocks["ROWS"]), None
    with torch.cuda.device_of(x):
        _rms_norm_backward_kernel[(programs,)](
            d_out,
            d_sum,
            x,
            weight.contiguous(),
            rstd,
            d_x if needs_x else None,
            partial,
            d_out.stride(0),
            0 if d_sum is None else d_sum.stride(0),
            x.stride(0),
            tokens,
            dim,
            BLOCK=triton.next_power_of_2(dim),
            **blocks,
        )
    # Which rows a program sums is fixed, and so is the order of this sum: the same gradient in every run.
    return d_x, weight.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)


def _processors(device: torch.device) -> int:
    """Multiprocessors of the card; 2 in the interpreter, so that its programs take several rows too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@torch.library.custom_op("llava_kernels::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, rstd (...,) float32)."""
    normed, _, rstd = _forward(x, None, weight, eps)
    return normed, rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("llava_kernels::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, sum, rstd (...,) float32)."""
    normed, total, rstd = _forward(x, residual, weight, eps)
    assert total is not None
    return normed, total, rstd


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("llava_kernels::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    d_out: Tensor,
    d_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(d_x with d_sum added, d_weight); of what is not needed, an empty tensor."""
    return _backward(d_out, d_sum, x, weight, rstd, needs_x, needs_weight)


@_rms_norm_backward.register_fake
def _(
    d_out: Tensor,
    d_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), weight.new_empty(weight.shape if needs_weight else 0)


def _save_rms_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _differentiate_rms_norm(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    needs_x, needs_weight, _ = ctx.needs_input_grad
    d_x, d_weight = torch.ops.llava_kernels.rms_norm_backward(d_out, None, *ctx.saved_tensors, needs_x, needs_weight)
    return d_x if needs_x else None, d_weight if needs_weight else None, None


def _save_add_rms_norm(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # the last layer's sum goes nowhere
    ctx.save_for_backward(total, inputs[2], rstd)


def _differentiate_add_rms_norm(
    ctx: Any, d_normed: Tensor | None, d_sum: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad
    needs_both = needs_x or needs_residual
    if d_normed is None:
        d_both, d_weight, needs_weight = d_sum, None, False
    else:
        d_both, d_weight = torch.ops.llava_kernels.rms_norm_backward(
            d_normed, d_sum if needs_both else None, *ctx.saved_tensors, needs_both, needs_weight
        )
    return (
        d_both if needs_x else None,
        d_both if needs_residual else None,
        d_weight if needs_weight else None,
        None,
    )


native.runs_on_cpu(_rms_norm, native_training.rms_norm)
native.runs_on_cpu(_add_rms_norm, native_training.add_rms_norm)
native.runs_on_cpu(_rms_norm_backward, native_training.rms_norm_backward)
_rms_norm.register_autograd(_differentiate_rms_norm, setup_context=_save_rms_norm)
_add_rms_norm.register_autograd(_differentiate_add_rms_norm, setup_context=_save_add_rms_norm)


def builds(arch: int) -> list[Build]:
    """Forward with and without the addition, backward for a trained and a frozen weight; LLaVA 7B and 13B.

    "inference" keeps nothing for a backward pass: it is what the C library launches.
    """
    return [build for dim in (4096, 5120) for build in _builds(arch, dim)]


def _builds(arch: int, dim: int) -> list[Build]:
    def build(name: str, kernel: Any, blocks: dict[str, int], absent: tuple[str, ...]) -> Build:
        blocks = {k: v for k, v in blocks.items() if k != "programs_per_processor"}
        num_warps = blocks.pop("num_warps")
        kinds = {n: _TYPES.get(n, "*bf16") for n in kernel.arg_names if not n.isupper() and n not in absent}
        return Build(
            name=f"{name}_bf16_{dim}",
            kernel=kernel,
            signature=kinds,
            constants={**dict.fromkeys(absent), **blocks, "BLOCK": triton.next_power_of_2(dim)},
            num_warps=num_warps,
            kind="memory",
            not_aligned=("tokens",),
        )

    forward, backward = _rms_norm_forward_kernel, _rms_norm_backward_kernel
    one_row, frozen = blocks_on("rms_norm", arch, dim), blocks_on("rms_norm_backward", arch, dim)
    trained = blocks_on("rms_norm_backward_weight", arch, 2 * dim)
    return [
        build("rms_norm_forward", forward, one_row, ("residual_ptr", "sum_ptr")),
        build("add_rms_norm_forward", forward, one_row, ()),
        build("rms_norm_inference", forward, one_row, ("residual_ptr", "sum_ptr", "rstd_ptr")),
        build("add_rms_norm_inference", forward, one_row, ("rstd_ptr",)),
        build("rms_norm_backward_frozen", backward, frozen, ("d_sum_ptr", "partial_ptr")),
        build("rms_norm_backward", backward, trained, ("d_sum_ptr",)),
        build("add_rms_norm_backward_frozen", backward, frozen, ("partial_ptr",)),
        build("add_rms_norm_backward", backward, trained, ()),
    ]


_TYPES = {
    "rstd_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "x_stride": "i32",
    "residual_stride": "i32",
    "d_out_stride": "i32",
    "d_sum_stride": "i32",
    "tokens": "i32",
    "dim": "i32",
    "eps": "fp32",
}


def candidates(arch: int) -> list[dict[str, int]]:
    """Block sizes to time for the forward pass."""
    return [{"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4, 8) for warps in (2, 4, 8, 16)]


def tuning_case(dim: int, device: torch.device) -> Callable[[], Any]:
    x, weight = (torch.randn(*shape, dim, device=device, dtype=torch.bfloat16) for shape in ((1 << 14,), ()))
    return lambda: rms_norm(x, weight, 1e-5)
