"""quantized_linear: products with weights kept in 8 or 4 bits, read once for a few rows of activations.

How a weight lies in memory. K is cut into blocks (128 values, or a group in int4), a block into 32-bit words. Value k
of a block is found by ``k = plane * (block // planes) + 2 * word + half``: a plane is a stretch of the block whose
values sit at the same bits of all its words, two a word, one in each 16-bit half. So one mask takes two neighbours of a
plane out of a word, just as a register of the tensor cores holds a pair of 16-bit floats, and the activations that they
meet are contiguous. 8 bits: 2 planes, value at bits ``8 * plane + 16 * half``; 4 bits: 4 planes, at
``4 * plane + 16 * half``.

How bits become numbers with no conversion. Bits in the mantissa of a float whose exponent is 0 are an integer times a
power of two (a subnormal; the lowest bit of the exponent continues that line, so 8 bits fit the 7 of bfloat16), and one
fused multiply-add, exact on subnormals, brings them to size and takes the offset away. float8_e4m3fn is such a float
with fewer bits: moved to the other's places it is its value times a power of two, subnormals included. There is no NaN
in these weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native
from llava_kernels.build import Build, Kind
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on

BLOCK = 128  # values of K that are laid out together in the 8-bit formats
GROUP_SIZES = (64, 128, 256)
FEW_ROWS = 64  # the most rows for which the kernels read the codes themselves; more: dequantise, then a matrix product
FP8_MAX = 448.0
PLANES = {"int8": 2, "int4": 4, "fp8": 2}


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """``value = scale * (code - 128)``, codes 1 to 255, one scale an output channel.

    Args:
        words: (N, K / 4) int32, laid out as the module says; K rounded up to a multiple of 128.
        scale: (N,) float32.
        in_features: K as it was.
    """

    words: Tensor
    scale: Tensor
    in_features: int


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """``value = channel * (scale * code + offset)``, codes 0 to 15, one scale and offset a group of K.

    Args:
        words: (N, K / 8) int32, laid out as the module says; K rounded up to a multiple of the group.
        scale, offset: (K / group, N) bfloat16, of the weight divided by ``channel``.
        channel: (N,) float32, powers of two: the largest magnitude of the row, rounded up.
        group_size: 64, 128 or 256.
        in_features: K as it was.
    """

    words: Tensor
    scale: Tensor
    offset: Tensor
    channel: Tensor
    group_size: int
    in_features: int


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """``value = scale * code``, one scale an output channel.

    Args:
        codes: (N, K) float8_e4m3fn, laid out as the module says; K rounded up to a multiple of 128.
        scale: (N,) float32.
        in_features: K as it was.
    """

    codes: Tensor
    scale: Tensor
    in_features: int


def linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ dequantize_int8(weight).T + bias``, for inference.

    Args:
        x: (..., K) float32, float16 or bfloat16. Up to 64 rows run kernels that read the codes once; more run a
            dequantisation and a matrix product. A single row must lie below 2**48 (3e14) in magnitude, because its
            kernel works with x times 2**80.
        bias: (N,) in x's dtype.

    Returns:
        (..., N) in x's dtype.

    Raises:
        TypeError: x is of another dtype, or the bias is not of x's.
        ValueError: a shape does not fit the weight.
        RuntimeError: x or the bias requires a gradient: there is no backward pass.
    """
    _check(x, weight, bias)
    if use_triton(x) or _few_on_cpu(x, bias):
        return torch.ops.llava_kernels.linear_int8(x, weight.words, weight.scale, bias)
    return linear_int8_reference(x, weight, bias)


def linear_int4(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ dequantize_int4(weight).T + bias``, for inference. Arguments and errors as of :func:`linear_int8`."""
    _check(x, weight, bias)
    if use_triton(x) or _few_on_cpu(x, bias):
        w = weight
        return torch.ops.llava_kernels.linear_int4(x, w.words, w.scale, w.offset, w.channel, w.group_size, bias)
    return linear_int4_reference(x, weight, bias)


def linear_fp8(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, fp8_activations: bool = False) -> Tensor:
    """``x @ dequantize_fp8(weight).T + bias``, for inference. Arguments and errors as of :func:`linear_int8`.

    Args:
        fp8_activations: with more than 64 rows of bfloat16, x is rounded to float8 too, one scale a row, and the
            product runs on the float8 tensor cores (``torch._scaled_mm``; sm_89 and later). Elsewhere no change.
    """
    _check(x, weight, bias)
    if use_triton(x):
        words = weight.codes.view(torch.int32)
        return torch.ops.llava_kernels.linear_fp8(x, words, weight.scale, bias, fp8_activations)
    return linear_fp8_reference(x, weight, bias)


def _few_on_cpu(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the C library multiplies: few rows, as on a GPU."""
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1] and native.use_native(x, bias)


def linear_int8_reference(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantize_int8(weight).to(x.dtype), bias)


def linear_int4_reference(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantize_int4(weight).to(x.dtype), bias)


def linear_fp8_reference(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantize_fp8(weight).to(x.dtype), bias)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Round (N, K) to 255 levels, symmetric, by the largest magnitude of each row: at most half a step off."""
    padded = _pad(weight, BLOCK)
    scale = _largest(padded) / 127
    codes = torch.round(padded / scale[:, None]) + 128
    return Int8Weight(_interleave(codes.to(torch.uint8), BLOCK, 2).view(torch.int32), scale, weight.shape[1])


def quantize_int4(weight: Tensor, group_size: int = 128) -> Int4Weight:
    """Round (N, K) to 16 levels between each group's smallest and largest value, or a little inside them.

    Offsets are kept because they keep accuracy: groups are not symmetric. Each group takes the one of five ranges, from
    the whole down to three quarters of it, that leaves the smallest squared error. A value inside the range is at most
    half a step off, and the rounding of the offset (2**-8 of it). Scales keep 7 bits, so that ``scale * code`` is exact
    in float16.

    Raises:
        ValueError: ``group_size`` is not 64, 128 or 256.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
    padded = _pad(weight, group_size)
    channel = torch.exp2(torch.ceil(torch.log2(_largest(padded))))
    groups = (padded / channel[:, None]).unflatten(1, (-1, group_size))  # (N, G, group)
    best = _round_int4(groups, 1.0)
    for part in (0.94, 0.88, 0.82, 0.76):
        one = _round_int4(groups, part)
        better = _squared_error(groups, *one) < _squared_error(groups, *best)
        codes, scale, offset = (torch.where(better, new, old) for new, old in zip(one, best, strict=True))
        best = codes, scale, offset
    codes = _interleave(codes.to(torch.uint8).flatten(1), group_size, 4)
    words = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int32)
    scale, offset = (t.squeeze(2).t().contiguous().to(torch.bfloat16) for t in (scale, offset))
    return Int4Weight(words, scale, offset, channel, group_size, weight.shape[1])


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """Round (N, K) to float8_e4m3fn, the largest magnitude of each row brought to 448.

    A value is at most 1/16 of itself off, or 2**-10 of the scale where that is more.
    """
    padded = _pad(weight, BLOCK)
    scale = _largest(padded) / FP8_MAX
    codes = (padded / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = _interleave(codes.view(torch.uint8), BLOCK, 2).view(torch.float8_e4m3fn)
    return Fp8Weight(codes, scale, weight.shape[1])


def dequantize_int8(weight: Int8Weight) -> Tensor:
    """(N, K) float32."""
    codes = _straighten(weight.words.view(torch.uint8), BLOCK, 2).float()
    return ((codes - 128) * weight.scale[:, None])[:, : weight.in_features].contiguous()


def dequantize_int4(weight: Int4Weight) -> Tensor:
    """(N, K) float32."""
    packed = weight.words.view(torch.uint8)
    codes = _straighten(torch.stack([packed & 15, packed >> 4], dim=2).flatten(1), weight.group_size, 4).float()
    scale, offset = (t.t().float().unsqueeze(2) for t in (weight.scale, weight.offset))  # (N, G, 1)
    values = (codes.unflatten(1, (-1, weight.group_size)) * scale + offset).flatten(1) * weight.channel[:, None]
    return values[:, : weight.in_features].contiguous()


def dequantize_fp8(weight: Fp8Weight) -> Tensor:
    """(N, K) float32."""
    codes = _straighten(weight.codes.view(torch.uint8), BLOCK, 2).view(torch.float8_e4m3fn).float()
    return (codes * weight.scale[:, None])[:, : weight.in_features].contiguous()


def _check(x: Tensor, weight: Int8Weight | Int4Weight | Fp8Weight, bias: Tensor | None) -> None:
    out_features = (weight.codes if isinstance(weight, Fp8Weight) else weight.words).shape[0]
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}; float32, float16 or bfloat16 is needed")
    if x.ndim == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of {weight.in_features} input features")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"the bias is {bias.dtype}, x is {x.dtype}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {out_features} output features")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError("quantised products have no backward pass; call them under torch.no_grad()")


def _pad(weight: Tensor, multiple: int) -> Tensor:
    """(N, K) -> float32 with K a multiple; the last column is repeated, so that no group's range grows by it."""
    weight = weight.detach().float()
    missing = -weight.shape[1] % multiple
    return torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)


def _largest(weight: Tensor) -> Tensor:
    """(N,): the largest magnitude of each row, 1 where it is 0."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest, 1.0)


def _interleave(codes: Tensor, block: int, planes: int) -> Tensor:
    """(N, K) codes in order -> in the order in which they lie in the words, lowest bits first."""
    return codes.unflatten(1, (-1, planes, block // planes // 2, 2)).permute(0, 1, 3, 4, 2).flatten(1).contiguous()


def _straighten(codes: Tensor, block: int, planes: int) -> Tensor:
    """The inverse of :func:`_interleave`."""
    return codes.unflatten(1, (-1, block // planes // 2, 2, planes)).permute(0, 1, 4, 2, 3).flatten(1).contiguous()


def _round_int4(groups: Tensor, part: float) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, offset) with which the middle ``part`` of each group's range is covered; scales rounded up."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2 * part
    mantissa, exponent = torch.frexp((2 * half / 15).clamp(min=1e-30))
    scale = torch.ldexp(torch.ceil(mantissa * 128) / 128, exponent)
    offset = (middle - half).bfloat16().float()
    return torch.round((groups - offset) / scale).clamp(0, 15), scale, offset


def _squared_error(groups: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return (codes * scale + offset - groups).square().sum(2, keepdim=True)


@triton.constexpr_function
def _position(form: str, index: int) -> int:
    """At which bit of a float32 _value leaves the unit of the value with a word's index-th bits."""
    if form == "fp8":
        return 29
    bit, step = (8 * index, 8) if form == "int8" else (4 * index, 12)
    return bit if bit <= 16 else bit - step


@triton.jit
def _value(words, index: tl.constexpr, FORMAT: tl.constexpr):
    """The value with the index-th bits of each word as float32: centred int8 and fp8 codes, int4 codes as they are.

    Still to be multiplied by 2**(149 - position).
    """
    POSITION: tl.constexpr = _position(FORMAT, index)
    if FORMAT == "fp8":  # sign at bit 31, exponent and mantissa at 26 to 20
        signed = (words << (24 - 8 * index)).to(tl.int32, bitcast=True) >> 4
        value = (signed & -0x78100000).to(tl.float32, bitcast=True)
    else:
        BITS: tl.constexpr = 8 if FORMAT == "int8" else 4
        bits = (words >> (BITS * index - POSITION)) & ((2**BITS - 1) << POSITION)
        value = bits.to(tl.float32, bitcast=True)
        if FORMAT == "int8":
            value -= 2.0 ** (POSITION + 7 - 149)
    return value


@triton.jit
def _row_kernel(
    x_ptr,  # (K,)
    words_ptr,  # (N, words)
    scale_ptr,  # (G, N), int4
    offset_ptr,  # (G, N), int4
    channel_ptr,  # (N,)
    bias_ptr,  # (N,)
    out_ptr,  # (splits, N)
    N,
    K,
    words,
    span,  # words that a split reads, a multiple of BLOCK_WORDS
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One row of x: a program reads BLOCK_N rows of the weight, its split of K; nothing is shared between programs.

    Values stay subnormal: x is brought up by 2**80, less the bit at which they lie, and the sum by the rest (2**69).
    """
    PLANES: tl.constexpr = 4 if FORMAT == "int4" else 2
    WORDS: tl.constexpr = BLOCK_K // (2 * PLANES)  # words of a block
    GROUPS: tl.constexpr = BLOCK_WORDS // WORDS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    j = tl.arange(0, BLOCK_WORDS)
    k_of_word = j // WORDS * BLOCK_K + j % WORDS * 2
    from_ptr = words_ptr + (row.to(tl.int64)[:, None] * words + j[None, :])
    acc = tl.zeros((BLOCK_N, GROUPS if FORMAT == "int4" else BLOCK_WORDS), tl.float32)
    begin = tl.program_id(1) * span
    for first in range(begin, tl.minimum(begin + span, words), BLOCK_WORDS):
        inside = (j < words - first)[None, :]
        tile = tl.load(from_ptr + first, mask=inside, other=0).to(tl.uint32, bitcast=True)
        product = tl.zeros((BLOCK_N, BLOCK_WORDS), tl.float32)
        x_sum = tl.zeros((BLOCK_WORDS,), tl.float32)
        for plane in tl.static_range(PLANES):
            k = first // WORDS * BLOCK_K + plane * (2 * WORDS) + k_of_word[:, None] + tl.arange(0, 2)[None, :]
            low, high = tl.split(tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32))
            x_sum += low + high
            low *= 2.0 ** (80 - _position(FORMAT, plane))
            high *= 2.0 ** (80 - _position(FORMAT, plane + PLANES))
            product += _value(tile, plane, FORMAT) * low[None, :]
            product += _value(tile, plane + PLANES, FORMAT) * high[None, :]
        if FORMAT == "int4":
            g = first // WORDS + tl.arange(0, GROUPS)
            has_scale = (g < words // WORDS)[None, :]
            at = g[None, :] * N + row[:, None]
            scale = tl.load(scale_ptr + at, mask=has_scale, other=0.0).to(tl.float32)
            offset = tl.load(offset_ptr + at, mask=has_scale, other=0.0).to(tl.float32)
            acc += tl.sum(tl.reshape(product, (BLOCK_N, GROUPS, WORDS)), axis=2) * (scale * 2.0**69)
            acc += offset * tl.sum(tl.reshape(x_sum, (GROUPS, WORDS)), axis=1)[None, :]
        else:
            acc += product
    y = tl.sum(acc, axis=1) * tl.load(channel_ptr + row)
    if FORMAT != "int4":
        y *= 2.0**69
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    out = out_ptr + tl.program_id(1).to(tl.int64) * N + n
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.constexpr_function
def _lift(form: str, plane: int, bf16: bool) -> int:
    """By how many bits a plane of a word moves up to its place in two 16-bit floats."""
    if form == "int8":
        return -8 * plane
    if form == "int4":  # the top of the mantissa, so that a scale that undoes the exponent is still finite
        return (3 if bf16 else 6) - 4 * plane
    return (4 if bf16 else 7) - 8 * plane


@triton.constexpr_function
def _mask(form: str, bf16: bool) -> int:
    """The places of codes in two 16-bit floats, in fp8 but for the sign."""
    masks = {"int8": (0x00FF00FF, 0x00FF00FF), "int4": (0x03C003C0, 0x00780078), "fp8": (0x3F803F80, 0x07F007F0)}
    return masks[form][bf16]


@triton.constexpr_function
def _unit(form: str, bf16: bool) -> float:
    """What the values of _plane are to be multiplied by, but for the channel's scale."""
    if form == "int8":
        return 64.0 if bf16 else 512.0
    return 1.0


@triton.jit
def _plane(words, mul, add, PLANE: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """(N, W) words -> (N, 2W) values of one plane, ``code * mul + add``, in ``dtype``.

    Codes are floats with exponent 0 (fp8: its own): 16-bit floats of ``dtype``, float16 where that is float32.
    """
    BF16: tl.constexpr = dtype == tl.bfloat16
    CODE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    UP: tl.constexpr = _lift(FORMAT, PLANE, BF16)
    MASK: tl.constexpr = _mask(FORMAT, BF16)
    bits = ((words << UP) if UP > 0 else (words >> -UP)) & MASK
    if FORMAT == "fp8":
        bits |= (words << (8 - 8 * PLANE)) & 0x80008000
    # High halves first: in this order, and joined after the arithmetic, no register is shuffled.
    high = tl.fma((bits >> 16).to(tl.uint16).to(CODE, bitcast=True).to(dtype), mul, add)
    low = tl.fma(bits.to(tl.uint16).to(CODE, bitcast=True).to(dtype), mul, add)
    return tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))


@triton.jit
def _scales(scale_ptr, offset_ptr, at, ROWS: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """(mul, add) of (ROWS, 1) for _plane. What it gives is the value in units of _unit."""
    BF16: tl.constexpr = dtype == tl.bfloat16
    if FORMAT == "int4":  # codes times 2**-130 or 2**-18
        scale = tl.load(scale_ptr + at).to(tl.float32) * (2.0**120 if BF16 else 2.0**8) * 2.0**10
        mul = scale.to(dtype)[:, None]
        add = tl.load(offset_ptr + at).to(tl.float32).to(dtype)[:, None]
    elif FORMAT == "int8":  # codes times 2**-133 or 2**-24, 128 to be taken away
        mul = tl.full((ROWS, 1), 2.0**127 if BF16 else 2.0**15, dtype)
        add = tl.full((ROWS, 1), -2.0 if BF16 else -0.25, dtype)
    else:  # codes times 2**-120 or 2**-8
        mul = tl.full((ROWS, 1), 2.0**120 if BF16 else 2.0**8, dtype)
        add = tl.full((ROWS, 1), 0.0, dtype)
    return mul, add


@triton.jit
def _rows_kernel(
    x_ptr,  # (M, K)
    words_ptr,  # (N, words)
    scale_ptr,  # (G, N), int4
    offset_ptr,  # (G, N), int4
    channel_ptr,  # (N,)
    bias_ptr,  # (N,)
    out_ptr,  # (splits, M, N)
    stride,  # of x's rows
    M,
    N,
    K,
    words,
    span,  # blocks of K that a split reads, a multiple of UNROLL
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """2 to BLOCK_M rows of x, as the narrow operand: the product is made transposed, its long side from the weight.

    The weight's tile goes from shared memory to registers as words and becomes the left operand there.
    """
    PLANES: tl.constexpr = 4 if FORMAT == "int4" else 2
    WORDS: tl.constexpr = BLOCK_K // (2 * PLANES)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    UNIT: tl.constexpr = _unit(FORMAT, x_ptr.dtype.element_ty == tl.bfloat16)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    m = tl.arange(0, BLOCK_M)
    k_of_plane = tl.arange(0, 2 * WORDS)
    from_ptr = words_ptr + (row.to(tl.int64)[:, None] * words + tl.arange(0, WORDS)[None, :])
    x_from_ptr = x_ptr + (m[None, :] * stride + k_of_plane[:, None])
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = tl.program_id(1) * span
    for first in range(begin, tl.minimum(begin + span, words // WORDS), UNROLL):
        for u in tl.static_range(UNROLL):
            block = first + u
            tile = tl.load(from_ptr + block * WORDS).to(tl.uint32, bitcast=True)
            mul, add = _scales(scale_ptr, offset_ptr, block * N + row, BLOCK_N, FORMAT, DTYPE)
            for plane in tl.static_range(PLANES):
                k = block * BLOCK_K + plane * (2 * WORDS)
                inside = m[None, :] < M
                if not EVEN_K:
                    inside &= (k + k_of_plane)[:, None] < K
                x = tl.load(x_from_ptr + k, mask=inside, other=0.0)
                acc = tl.dot(_plane(tile, mul, add, plane, FORMAT, DTYPE), x, acc, input_precision="ieee")
    y = acc * (tl.load(channel_ptr + row) * UNIT)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    out = out_ptr + tl.program_id(1).to(tl.int64) * M * N + (m[None, :] * N + n[:, None])
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def _sum_splits_kernel(
    parts_ptr,  # (SPLITS, size)
    bias_ptr,  # (N,)
    out_ptr,  # (size,) = (M, N)
    size,
    N,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The splits' sums added up, always in the same order."""
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = i < size
    y = tl.zeros((BLOCK_SIZE,), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + split * size + i, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(
    words_ptr,  # (N, words)
    scale_ptr,  # (G, N), int4
    offset_ptr,  # (G, N), int4
    channel_ptr,  # (N,)
    out_ptr,  # (N, K)
    N,
    K,
    words,
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program makes one block of K of BLOCK_N rows, in float32, rounded once."""
    PLANES: tl.constexpr = 4 if FORMAT == "int4" else 2
    WORDS: tl.constexpr = BLOCK_K // (2 * PLANES)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    block = tl.program_id(1)
    tile = tl.load(words_ptr + (row.to(tl.int64)[:, None] * words + block * WORDS + tl.arange(0, WORDS)[None, :]))
    tile = tile.to(tl.uint32, bitcast=True)
    mul, add = _scales(scale_ptr, offset_ptr, block * N + row, BLOCK_N, FORMAT, tl.float32)
    channel = (tl.load(channel_ptr + row) * _unit(FORMAT, False))[:, None]
    for plane in tl.static_range(PLANES):
        k = block * BLOCK_K + plane * (2 * WORDS) + tl.arange(0, 2 * WORDS)
        values = _plane(tile, mul, add, plane, FORMAT, tl.float32) * channel
        out = out_ptr + (n.to(tl.int64)[:, None] * K + k[None, :])
        tl.store(out, values.to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


@dataclass(frozen=True)
class _Packed:
    """What the kernels take of a weight. 8-bit formats have no scale and offset a group: their pointers go unread."""

    form: str  # "int8", "int4", "fp8"
    words: Tensor  # (N, words) int32
    scale: Tensor  # (G, N) bfloat16
    offset: Tensor  # (G, N) bfloat16
    channel: Tensor  # (N,) float32
    block: int  # values of K

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.words, self.scale, self.offset, self.channel

    @property
    def steps(self) -> int:
        """Blocks of K."""
        return self.words.shape[1] * 2 * PLANES[self.form] // self.block


def _linear(x: Tensor, weight: _Packed, bias: Tensor | None) -> Tensor:
    rows, n = x.reshape(-1, x.shape[-1]), len(weight.words)
    out = x.new_empty(*x.shape[:-1], n)
    if out.numel() == 0:
        return out
    if len(rows) > FEW_ROWS:
        return F.linear(x, _dequantize(weight, x.shape[-1], x.dtype), bias)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    with torch.cuda.device_of(x):
        (_one_row if len(rows) == 1 else _few_rows)(rows, weight, bias, out)
    return out


def _one_row(x: Tensor, weight: _Packed, bias: Tensor | None, out: Tensor) -> None:
    n, words = weight.words.shape
    blocks = blocks_for("quantized_row", x.device, n)
    tiles, step = triton.cdiv(n, blocks["BLOCK_N"]), blocks["BLOCK_WORDS"]
    span, splits = _split(tiles, triton.cdiv(words, step), blocks.pop("programs"), blocks.pop("MIN_STEPS"))
    to, added = _target(out, bias, splits)
    _row_kernel[(tiles, splits)](
        *(x, *weight.tensors, x if added is None else added, to, n, x.shape[1], words, span * step),
        **{"FORMAT": weight.form, "BLOCK_K": weight.block, "HAS_BIAS": added is not None, **blocks},
    )
    _finish(to, bias, out, splits)


def _few_rows(x: Tensor, weight: _Packed, bias: Tensor | None, out: Tensor) -> None:
    n, words = weight.words.shape
    blocks = blocks_for("quantized_rows_fp32" if x.dtype == torch.float32 else "quantized_rows", x.device, len(x))
    unroll = 256 // weight.block if weight.form == "int4" else 1  # 128 bytes of each row a turn, as in 8 bits
    unroll = 1 if weight.steps % unroll else unroll
    tiles = triton.cdiv(n, blocks["BLOCK_N"])
    span, splits = _split(tiles, weight.steps // unroll, blocks.pop("programs"), blocks.pop("MIN_STEPS"))
    to, added = _target(out, bias, splits)
    even = x.shape[1] % weight.block == 0
    _rows_kernel[(tiles, splits)](
        *(x, *weight.tensors, x if added is None else added, to),
        *(x.stride(0), len(x), n, x.shape[1], words, span * unroll),
        **{"FORMAT": weight.form, "BLOCK_K": weight.block, "EVEN_K": even, "HAS_BIAS": added is not None},
        **{"UNROLL": unroll, **blocks},
    )
    _finish(to, bias, out, splits)


def _split(tiles: int, steps: int, programs: int, at_least: int) -> tuple[int, int]:
    """(steps of K a split, splits): so many that about ``programs`` run, each with ``at_least`` steps where it can."""
    wanted = max(1, min(programs // tiles, steps // at_least))
    span = triton.cdiv(steps, wanted)
    return span, triton.cdiv(steps, span)


def _target(out: Tensor, bias: Tensor | None, splits: int) -> tuple[Tensor, Tensor | None]:
    """(where the kernel writes, the bias that it adds): the result itself, or each split's sum in float32."""
    if splits == 1:
        return out, bias
    return out.new_empty((splits, out.numel()), dtype=torch.float32), None


def _finish(parts: Tensor, bias: Tensor | None, out: Tensor, splits: int) -> None:
    if splits == 1:
        return
    blocks = blocks_for("quantized_sum_splits", out.device, out.numel())
    _sum_splits_kernel[(triton.cdiv(out.numel(), blocks["BLOCK_SIZE"]),)](
        *(parts, parts if bias is None else bias, out, out.numel(), out.shape[-1]),
        **{"HAS_BIAS": bias is not None, "SPLITS": splits, **blocks},
    )


def _dequantize(weight: _Packed, in_features: int, dtype: torch.dtype) -> Tensor:
    n, words = weight.words.shape
    out = weight.channel.new_empty((n, in_features), dtype=dtype)
    blocks = blocks_for("quantized_dequantize", out.device, n)
    with torch.cuda.device_of(out):
        _dequantize_kernel[(triton.cdiv(n, blocks["BLOCK_N"]), weight.steps)](
            *(*weight.tensors, out, n, in_features, words),
            **{"FORMAT": weight.form, "BLOCK_K": weight.block, **blocks},
        )
    return out


def _scaled_product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x rounded to float8, one scale a row, its columns in the order of the codes; the product on float8 cores."""
    rows = F.pad(x.reshape(-1, x.shape[-1]).float(), (0, codes.shape[1] - x.shape[-1]))
    x_scale = _largest(rows)[:, None] / FP8_MAX
    x_codes = _interleave((rows / x_scale).clamp(-FP8_MAX, FP8_MAX), BLOCK, 2).to(torch.float8_e4m3fn)
    y = torch._scaled_mm(x_codes, codes.t(), scale_a=x_scale, scale_b=scale[None, :], out_dtype=x.dtype)
    return (y if bias is None else y + bias).view(*x.shape[:-1], len(codes))


def _can_scale(x: Tensor, out_features: int) -> bool:
    """Whether torch._scaled_mm with a scale a row runs here: bfloat16, N a multiple of 16, a card with float8 cores."""
    capable = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9)
    return capable and x.dtype == torch.bfloat16 and out_features % 16 == 0 and x.numel() > FEW_ROWS * x.shape[-1]


@torch.library.custom_op("llava_kernels::linear_int8", mutates_args=())
def _linear_int8(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, _Packed("int8", words, scale, scale, scale, BLOCK), bias)


@_linear_int8.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(words))


native.runs_on_cpu(_linear_int8, native.linear_int8)


@torch.library.custom_op("llava_kernels::linear_int4", mutates_args=())
def _linear_int4(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor, channel: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    return _linear(x, _Packed("int4", words, scale, offset, channel, group_size), bias)


@_linear_int4.register_fake
def _(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor, channel: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(words))


native.runs_on_cpu(_linear_int4, native.linear_int4)


@torch.library.custom_op("llava_kernels::linear_fp8", mutates_args=())
def _linear_fp8(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, fp8_activations: bool) -> Tensor:
    if fp8_activations and _can_scale(x, len(words)):
        return _scaled_product(x, words.view(torch.float8_e4m3fn), scale, bias)
    return _linear(x, _Packed("fp8", words, scale, scale, scale, BLOCK), bias)


@_linear_fp8.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, fp8_activations: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(words))


def builds(arch: int) -> list[Build]:
    """Each format for 1, 16, 32 and 64 rows, its dequantisation, and the sum of splits. Sizes are arguments."""
    formats = []
    for form in PLANES:
        constants: dict[str, Any] = {"FORMAT": form, "BLOCK_K": BLOCK, "HAS_BIAS": False}
        blocks = blocks_on("quantized_row", arch, 4096)
        formats.append(_build(f"linear_{form}_row", _row_kernel, constants | blocks, "memory"))
        constants |= {"EVEN_K": True, "UNROLL": 2 if form == "int4" else 1}
        for rows in (16, 32, 64):
            blocks = blocks_on("quantized_rows", arch, rows)
            formats.append(_build(f"linear_{form}_rows_{rows}", _rows_kernel, constants | blocks, "gemm"))
        blocks = blocks_on("quantized_dequantize", arch, 4096)
        constants = {"FORMAT": form, "BLOCK_K": BLOCK}
        formats.append(_build(f"dequantize_{form}", _dequantize_kernel, constants | blocks, "memory"))
    constants = {"HAS_BIAS": False, "SPLITS": 4} | blocks_on("quantized_sum_splits", arch, 4096)
    return [*formats, _build("linear_sum_splits", _sum_splits_kernel, constants, "memory")]


def _build(name: str, kernel: Any, constants: dict[str, Any], kind: Kind) -> Build:
    types = {"words_ptr": "*i32", "channel_ptr": "*fp32", "parts_ptr": "*fp32"}
    names = [n for n in kernel.arg_names if n not in constants]
    options = {n: constants[n] for n in ("num_warps", "num_stages") if n in constants}
    return Build(
        name=f"{name}_bf16",
        kernel=kernel,
        signature={n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names if n not in options},
        constants={n: v for n, v in constants.items() if n in kernel.arg_names},
        kind=kind,
        not_aligned=("M",),
        **options,
    )
