"""frozen_linear: products with a frozen weight in float8, whose forward pass and input gradient both run in float8.

What training through a frozen decoder needs: ``y = x W^T`` and ``dx = dy W``, and never a gradient of W. The weight is
rounded once to float8 (e4m3), one scale an output channel; activations and incoming gradients are rounded for every
product, one scale a row (rowwise scaling, as in torchao's recipe of that name). So every sum of products of codes is
brought to size by one scale of its row and one of its column.

In ``dx = dy W`` the weight's scales lie along what is summed over, where no such product takes scales: dy's columns are
multiplied by them before dy is rounded. Both passes so have the same weight, and the gradient is that of the function
that was computed. The tensor cores of sm_89 and sm_90 want both operands contiguous along the sum, hence the same codes
lie in memory twice, W and W^T: two bytes a weight, as in bfloat16, in exchange for no transposition in any step.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MULTIPLE = 16  # of both sizes of a weight, which the float8 products of CUDA want


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """``value[n, k] = scale[n] * codes[n, k]``.

    Args:
        codes: (N, K) float8_e4m3fn.
        transposed: (K, N), the same codes.
        scale: (N,) float32.
    """

    codes: Tensor
    transposed: Tensor
    scale: Tensor


def freeze_fp8(weight: Tensor) -> FrozenWeight:
    """Round (N, K) to float8, the largest magnitude of each row brought to 448.

    A value is at most 1/16 of itself off, or 2**-10 of the scale where that is more.

    Raises:
        ValueError: N or K is no multiple of 16.
    """
    n, k = weight.shape
    if n % MULTIPLE or k % MULTIPLE:
        raise ValueError(f"a weight of shape ({n}, {k}) cannot be kept for float8 products: multiples of 16 are needed")
    codes, scale = _round_rows_reference(weight.detach(), None)
    return FrozenWeight(codes, codes.t().contiguous(), scale)


def frozen_linear(x: Tensor, weight: FrozenWeight) -> Tensor:
    """``x @ value(weight).T`` with x rounded to float8; the gradient of x is computed likewise. x is not kept for it.

    Args:
        x: (T, K) bfloat16 on CUDA (sm_89 or later); elsewhere float32 or float16 too, where codes are multiplied and
            added up in float32.

    Returns:
        (T, N) in x's dtype.

    Raises:
        TypeError: x is not bfloat16 and on CUDA.
        ValueError: the shapes do not fit.
    """
    if x.ndim != 2 or x.shape[1] != weight.codes.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.codes.shape)}")
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise TypeError(f"x is {x.dtype}; float8 products with a scale a row are made in bfloat16 on CUDA")
    return torch.ops.llava_kernels.frozen_linear(x, weight.codes, weight.transposed, weight.scale)


def round_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (T, K), its columns first multiplied by ``columns`` (K,), as float8 codes (T, K) and scales (T,) float32.

    Whatever is not finite in a row makes all of its products NaN.
    """
    if not use_triton(x):
        return _round_rows_reference(x, columns)
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if x.numel():
        blocks = blocks_for("round_rows", x.device, x.shape[1])
        block = triton.next_power_of_2(x.shape[1])
        with torch.cuda.device_of(x):
            _round_rows_kernel[(len(x),)](
                *(x, x if columns is None else columns, codes, scale, x.stride(0), x.shape[1]),
                **{"HAS_COLUMNS": columns is not None, "BLOCK": block, **blocks},
            )
    return codes, scale


def _round_rows_reference(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.float() if columns is None else x.float() * columns
    largest = x.abs().amax(dim=1)
    scale = torch.where(largest == 0, 1.0, largest / FP8_MAX)
    return (x / scale[:, None]).to(FP8), scale


@triton.jit
def _round_rows_kernel(
    x_ptr,  # (T, K)
    columns_ptr,  # (K,)
    codes_ptr,  # (T, K)
    scale_ptr,  # (T,)
    stride,  # of x's rows
    K,
    HAS_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program holds one row in registers: read once, written once. No quotient rounds past 448."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    x = tl.load(x_ptr + row * stride + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        x *= tl.load(columns_ptr + k, mask=inside, other=0.0)
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.where(largest == 0, 1.0, largest / 448.0)
    tl.store(codes_ptr + row * K + k, (x / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, scale)


def _product(x: Tensor, scale: Tensor, codes: Tensor, columns: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """``scale[t] * columns[n] * sum over k of x[t, k] codes[n, k]``, (T, N). ``fast``: fewer bits in the sum."""
    if len(x) == 0:
        return torch.empty(0, len(codes), dtype=dtype, device=x.device)
    if not x.is_cuda:  # every product of two codes is exact in float32
        return (x.float() @ codes.float().t() * scale[:, None] * columns).to(dtype)
    return torch._scaled_mm(
        *(x, codes.t()), scale_a=scale[:, None], scale_b=columns[None, :], out_dtype=dtype, use_fast_accum=fast
    )


@torch.library.custom_op("llava_kernels::frozen_linear", mutates_args=())
def _frozen_linear(x: Tensor, codes: Tensor, transposed: Tensor, scale: Tensor) -> Tensor:
    rounded, row_scale = round_rows(x)
    return _product(rounded, row_scale, codes, scale, x.dtype, fast=True)


@_frozen_linear.register_fake
def _(x: Tensor, codes: Tensor, transposed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(codes))


@torch.library.custom_op("llava_kernels::frozen_linear_backward", mutates_args=())
def _frozen_linear_backward(dy: Tensor, transposed: Tensor, scale: Tensor) -> Tensor:
    rounded, row_scale = round_rows(dy, scale)
    return _product(rounded, row_scale, transposed, scale.new_ones(len(transposed)), dy.dtype, fast=False)


@_frozen_linear_backward.register_fake
def _(dy: Tensor, transposed: Tensor, scale: Tensor) -> Tensor:
    return dy.new_empty(len(dy), len(transposed))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.llava_kernels.frozen_linear_backward(dy, *ctx.saved_tensors), None, None, None


_frozen_linear.register_autograd(_differentiate, setup_context=_save)


def builds(arch: int) -> list[Build]:
    """Rows of LLaVA 7B and 13B: inputs, and gradients with their columns multiplied. A100s have no float8."""
    if arch < 90:
        return []
    return [_build(f"round_rows_bf16_{width}", width, columns=False) for width in (4096, 5120, 11008, 13824)] + [
        _build(f"round_columns_bf16_{width}", width, columns=True) for width in (4096, 12288, 22016, 27648)
    ]


def _build(name: str, width: int, columns: bool) -> Build:
    types = {"x_ptr": "*bf16", "columns_ptr": "*fp32", "codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    return Build(
        name=name,
        kernel=_round_rows_kernel,
        signature=types | {"stride": "i32", "K": "i32"},
        constants={"HAS_COLUMNS": columns, "BLOCK": triton.next_power_of_2(width)},
        kind="memory",
        num_warps=blocks_on("round_rows", 90, width)["num_warps"],
    )
