"""linear_gelu: the first half of the MLP projector of LLaVA-1.5 (GELU: Hendrycks and Gimpel, 2016)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.linear import linear
from llava_kernels.tiles import TABLE, blocks_for


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x @ weight.T + bias)`` with the exact (erf) GELU.

    x is read where it lies: (N, n, C) with any strides over images and patches, as the vision tower's output without
    its class token (``x[:, 1:]``) has them, is not copied. Nothing but the inputs is kept for the backward.

    Args:
        x: (..., C).
        weight: (D, C), of x's dtype.
        bias: (D,) or None.

    Returns:
        (..., D) of x's dtype.

    Raises:
        ValueError: the sizes do not fit together, or the Triton kernel is to run on a dtype that it does not take.
    """
    d, c = weight.shape
    if x.shape[-1] != c or (bias is not None and bias.shape != (d,)):
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} or the bias")
    if use_triton(x):
        return torch.ops.llava_kernels.linear_gelu(x, weight, bias)
    if native.use_native(x, weight, bias, choices=("auto", "native")):
        return native.call(torch.ops.llava_kernels.linear_gelu, native.linear_gelu, x, weight, bias)
    return linear_gelu_reference(x, weight, bias)


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition of :func:`linear_gelu`."""
    return F.gelu(linear(x, weight, bias))


# ---- forward


@triton.jit(do_not_specialize=["M", "patches"])
def _linear_gelu_forward_kernel(
    x_ptr,  # row m = (image m // patches, patch m % patches), C contiguous
    weight_ptr,  # (D, C)
    bias_ptr,  # (D,) or None
    out_ptr,  # (M, D)
    M,
    patches,
    image_stride,
    patch_stride,
    C,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tile_m, tile_n = _grouped(tl.program_id(0), M, D, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _linear(
        x_ptr, weight_ptr, bias_ptr, m, n, M, patches, image_stride, patch_stride, C, D,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    out = y * _normal_below(y)
    out_at = out_ptr + m.to(tl.int64)[:, None] * D + n[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < D)[None, :])


@triton.jit
def _grouped(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile_m, tile_n): neighbours share GROUP_M rows of tiles, so that what they read stays in the L2 cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def _linear(
    x_ptr, weight_ptr, bias_ptr, m, n, M, patches, image_stride, patch_stride, C, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Rows m and columns n of ``x @ weight.T + bias``, (BLOCK_M, BLOCK_N) float32."""
    k = tl.arange(0, BLOCK_K)
    # Rows past the end read the last row instead: no mask in the loop, and nothing of them is stored.
    p = tl.minimum(m, M - 1)
    row = (p // patches).to(tl.int64) * image_stride + (p % patches).to(tl.int64) * patch_stride
    column = tl.minimum(n, D - 1).to(tl.int64) * C
    x_at = x_ptr + row[:, None] + k[None, :]  # (BLOCK_M, BLOCK_K)
    weight_at = weight_ptr + column[None, :] + k[:, None]  # (BLOCK_K, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, C, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(weight_at)
        else:
            a = tl.load(x_at, mask=(start + k < C)[None, :], other=0.0)
            b = tl.load(weight_at, mask=(start + k < C)[:, None], other=0.0)
        y = tl.dot(a, b, y, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _normal_below(y):
    """The share of the standard normal distribution that lies below y."""
    return 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)  # y / sqrt(2)


# ---- backward: the gradient of y = x @ weight.T + bias, with y computed again rather than kept


@triton.jit(do_not_specialize=["M", "patches"])
def _linear_gelu_backward_kernel(
    grad_ptr,  # (M, D) gradient of the output
    x_ptr,  # as in the forward
    weight_ptr,  # (D, C)
    bias_ptr,  # (D,) or None
    d_y_ptr,  # (M, D)
    sums_ptr,  # (tiles of rows, D) float32, d_y summed over each tile's rows; None if nobody wants the bias gradient
    M,
    patches,
    image_stride,
    patch_stride,
    C,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tile_m, tile_n = _grouped(tl.program_id(0), M, D, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _linear(
        x_ptr, weight_ptr, bias_ptr, m, n, M, patches, image_stride, patch_stride, C, D,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    # gelu(y) = y * normal(y), so gelu'(y) = normal(y) + y * density(y)
    slope = _normal_below(y) + y * tl.exp(-0.5 * y * y) * 0.3989422804014327  # 1 / sqrt(2 pi)
    at = m.to(tl.int64)[:, None] * D + n[None, :]
    inside = (m < M)[:, None] & (n < D)[None, :]
    d_y = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(d_y_ptr + at, d_y.to(d_y_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + tile_m.to(tl.int64) * D + n, tl.sum(d_y, axis=0), mask=n < D)


# ---- launchers and registration


@torch.library.custom_op("llava_kernels::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_dtypes(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    d, c = weight.shape
    rows, m, *steps = _rows_of(x)
    sizes = _sizes("linear_gelu", x, m)
    tiles = triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(d, sizes["BLOCK_N"])
    if tiles:
        with torch.cuda.device_of(x):
            _linear_gelu_forward_kernel[(tiles,)](
                rows, weight.contiguous(), None if bias is None else bias.contiguous(), out,
                m, *steps, c, d, EVEN_K=c % sizes["BLOCK_K"] == 0, **sizes,
            )  # fmt: skip
    return out


native.runs_on_cpu(_linear_gelu, native.linear_gelu)


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("llava_kernels::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of x @ weight.T + bias as (M, D), bias gradient)."""
    d, c = weight.shape
    rows, m, *steps = _rows_of(x)
    sizes = _sizes("linear_gelu_backward", x, m)
    d_y = x.new_empty(m, d)
    tiles_m = triton.cdiv(m, sizes["BLOCK_M"])
    sums = x.new_empty(tiles_m if with_bias else 0, d, dtype=torch.float32)
    if tiles_m:
        with torch.cuda.device_of(x):
            _linear_gelu_backward_kernel[(tiles_m * triton.cdiv(d, sizes["BLOCK_N"]),)](
                grad.contiguous(), rows, weight.contiguous(), None if bias is None else bias.contiguous(),
                d_y, sums if with_bias else None,
                m, *steps, c, d, EVEN_K=c % sizes["BLOCK_K"] == 0, **sizes,
            )  # fmt: skip
    return d_y, sums.sum(0).to(x.dtype) if with_bias else x.new_empty(0)


@_linear_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor]:
    d = weight.shape[0]
    return x.new_empty(x.shape[:-1].numel(), d), x.new_empty(d if with_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    d_y, d_bias = torch.ops.llava_kernels.linear_gelu_backward(grad, x, weight, bias, needs_bias)
    # Nothing is left to fuse: plain products are cuBLAS's.
    d_x = (d_y @ weight).reshape(x.shape) if needs_x else None
    d_weight = d_y.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
    return d_x, d_weight, d_bias if needs_bias else None


_linear_gelu.register_autograd(_backward, setup_context=_save)


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"the Triton kernel takes float32, float16 and bfloat16, not {x.dtype}; "
            "llava_kernels.implementation('reference') takes it"
        )
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"x is {x.dtype}; weight and bias must be so too")


def _rows_of(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """(x, rows M, patches, image stride, patch stride): row m is patch m % patches of image m // patches."""
    if x.dim() > 3:
        x = x.flatten(0, -3)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() < 3:
        x = x.reshape(-1, x.shape[-1])
        return x, x.shape[0], 1, x.stride(0), 0
    images, patches, _ = x.shape
    image_stride, patch_stride, _ = x.stride()
    return x, images * patches, max(patches, 1), image_stride, patch_stride


def _sizes(op: str, x: Tensor, rows: int) -> dict[str, int]:
    # float32 has twice the bytes and no tensor cores at full precision: tiles of its own
    return blocks_for(op if x.element_size() == 2 else f"{op}_fp32", x.device, rows)


# ---- for compiling ahead of time


def builds(arch: int) -> list[Build]:
    """Every kernel at the block sizes with which LLaVA's sizes are launched, in bfloat16."""
    bf16 = "*bf16"
    inputs = {"x_ptr": bf16, "weight_ptr": bf16, "bias_ptr": bf16}
    sizes = {name: "i32" for name in ("M", "patches", "image_stride", "patch_stride", "C", "D")}
    kernels: list[tuple[str, Any, dict[str, str]]] = [
        ("linear_gelu", _linear_gelu_forward_kernel, {"out_ptr": bf16}),
        (
            "linear_gelu_backward",
            _linear_gelu_backward_kernel,
            {"grad_ptr": bf16, "d_y_ptr": bf16, "sums_ptr": "*fp32"},
        ),
    ]
    found = []
    for op, kernel, outputs in kernels:
        for row in TABLE[op]:
            if row.arch != arch:
                continue
            blocks = dict(row.blocks)
            warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
            build = Build(
                name=f"{op}_bf16_{'x'.join(str(v) for v in blocks.values())}",
                kernel=kernel,
                signature={**inputs, **outputs, **sizes},
                constants={**blocks, "EVEN_K": True},
                num_warps=warps,
                num_stages=stages,
                kind="gemm",
                not_aligned=("M", "patches"),
            )
            found.append(build)
    return found
