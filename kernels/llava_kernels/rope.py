"""rope: rotary position embedding (Su et al., 2021), LLaMA's pairing of element i with element i + head_dim/2."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native, native_training
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head of every token by its position's angles.

    Args:
        x: (T, heads, head_dim). Query and key heads of a token can be turned together; they may be a slice of the
            merged QKV product.
        cos, sin: (T, head_dim/2) float32, the angles' cosines and sines, gathered by position once for all layers.
            The kernel gives them no gradient.

    Returns:
        (T, heads, head_dim) in x's dtype; the products are taken in float32.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_angles(x, cos, sin)
    if use_triton(x) or native_training.takes(x):
        return torch.ops.llava_kernels.rope(x, cos, sin, False)
    return rope_reference(x, cos, sin)


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rope` written over ``x``, for inference. Returns ``x``.

    Raises:
        ValueError: ``x`` requires a gradient, or the shapes do not fit each other.
    """
    check_angles(x, cos, sin)
    if x.requires_grad:
        raise ValueError("rope_ overwrites x, which requires a gradient; use rope")
    if use_triton(x) or native_training.takes(x):
        torch.ops.llava_kernels.rope_(x, cos, sin)
        return x
    return x.copy_(rope_reference(x, cos, sin))


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (T, 1, head_dim/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def check_angles(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    tokens, _, head_dim = x.shape
    if head_dim % 2 or cos.shape != (tokens, head_dim // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"x is {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            "expected (T, heads, head_dim) and twice (T, head_dim/2)"
        )


@triton.jit(do_not_specialize=["tokens", "heads"])
def _rope_kernel(
    x_ptr,  # (tokens, heads, 2 * HALF)
    cos_ptr,  # (tokens, HALF)
    sin_ptr,  # (tokens, HALF)
    out_ptr,  # (tokens, heads, 2 * HALF); may be x itself
    x_token_stride,
    x_head_stride,
    out_token_stride,
    out_head_stride,
    tokens,
    heads,
    HALF: tl.constexpr,  # head_dim/2
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two from HALF on
    INVERSE: tl.constexpr,  # turn back
):
    """A program turns heads of TOKENS tokens, HEADS at a time, and reads the angles once.

    Both elements of a pair are loaded by the thread that stores them, which is what makes out == x possible. The grid's
    second axis, where it is longer than 1, shares a token's heads between programs.
    """
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    known = (token < tokens) & (column < HALF)
    cos = tl.load(cos_ptr + token * HALF + column, mask=known, other=0.0).to(tl.float32)  # (TOKENS, 1, BLOCK)
    sin = tl.load(sin_ptr + token * HALF + column, mask=known, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    for first in range(tl.program_id(1) * HEADS, heads, tl.num_programs(1) * HEADS):
        head = first + tl.arange(0, HEADS)[None, :, None]
        inside = known & (head < heads)
        source = x_ptr + token * x_token_stride + head * x_head_stride + column
        a = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # (TOKENS, HEADS, BLOCK)
        b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        target = out_ptr + token * out_token_stride + head * out_head_stride + column
        tl.store(target, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(target + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool) -> None:
    """x and out: last dimension contiguous, and the same tensor when in place."""
    tokens, heads, head_dim = x.shape
    if x.numel() == 0:
        return
    blocks = blocks_for("rope", x.device, tokens)
    shares = blocks.pop("shares")
    tile = pairs_tile(blocks.pop("pairs"), heads, head_dim)
    grid = (triton.cdiv(tokens, tile["TOKENS"]), min(shares, triton.cdiv(heads, tile["HEADS"])))
    with torch.cuda.device_of(x):
        _rope_kernel[grid](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            tokens,
            heads,
            INVERSE=inverse,
            **tile,
            **blocks,
        )


def pairs_tile(pairs: int, heads: int, head_dim: int) -> dict[str, int]:
    """A tile of about ``pairs`` pairs: as many heads of a token as there are, then more tokens."""
    half = head_dim // 2
    block = triton.next_power_of_2(half)
    at_once = max(1, min(pairs // block, triton.next_power_of_2(heads)))
    return {"HALF": half, "BLOCK": block, "HEADS": at_once, "TOKENS": max(1, pairs // (block * at_once))}


@torch.library.custom_op("llava_kernels::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    out = x.new_empty(x.shape)
    _turn(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, out, inverse)
    return out


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("llava_kernels::rope_", mutates_args=("x",))
def _rope_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.stride(-1) == 1:
        _turn(x, cos, sin, x, inverse=False)
    else:
        x.copy_(_rope(x, cos, sin, False))


@_rope_in_place.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
    """The turn by the opposite angle: a turn's matrix transposed."""
    return torch.ops.llava_kernels.rope(d_out, *ctx.saved_tensors, not ctx.inverse), None, None, None


native.runs_on_cpu(_rope, native_training.rope)
native.runs_on_cpu(_rope_in_place, native_training.rope_)
_rope.register_autograd(_differentiate, setup_context=_save)


def builds(arch: int) -> list[Build]:
    """Both directions at head sizes 64, 80 and 128, one token a program; how many heads there are is an argument."""
    return [_build(arch, head_dim, inverse) for head_dim in (64, 80, 128) for inverse in (False, True)]


def _build(arch: int, head_dim: int, inverse: bool) -> Build:
    blocks = blocks_on("rope", arch, 1 << 14)
    return Build(
        name=f"rope{'_inverse' * inverse}_bf16_{head_dim}",
        kernel=_rope_kernel,
        signature={
            **{"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": "*bf16"},
            **dict.fromkeys(("x_token_stride", "x_head_stride", "out_token_stride", "out_head_stride"), "i32"),
            **{"tokens": "i32", "heads": "i32"},
        },
        constants={**pairs_tile(blocks["pairs"], 64, head_dim), "INVERSE": inverse},
        num_warps=blocks["num_warps"],
        kind="memory",
        not_aligned=("tokens", "heads"),
    )
