"""store_kv: each token's keys and values into its slot of the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels.attention.paged import FP8
from llava_kernels.attention.triton_varlen import dense_heads, on
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on

LARGEST_FP8 = 448.0


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """k_cache[slot // block_size, slot % block_size] = k[token] for every token, v the same; in place, no gradients.

    Args:
        k, v: (T, kv_heads, head_dim).
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim) in k's dtype or float8_e4m3fn, which gets the values
            divided by the scale; what is beyond its largest number, 448, becomes that number.
        slots: (T,) int64, each at most once; a token of slot -1 is not stored.
        k_scale, v_scale: of a float8 cache.

    Raises:
        ValueError: dtypes or shapes do not fit together.
    """
    check_store(k, v, k_cache, v_cache, slots)
    if use_triton(k):
        torch.ops.llava_kernels.store_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    else:
        store_kv_reference(k, v, k_cache, v_cache, slots, k_scale, v_scale)


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    fit = k.dim() == 3 and k.shape == v.shape and k_cache.shape == v_cache.shape and k_cache.shape[2:] == k.shape[1:]
    if not fit:
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} do not fit together"
        )
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (k.dtype, FP8):
        raise ValueError(f"the caches are {k_cache.dtype} and {v_cache.dtype}; both must be {k.dtype} or {FP8}")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("the last dimension of the caches must be dense")
    if slots.shape != k.shape[:1]:
        raise ValueError(f"slots is {tuple(slots.shape)} for {k.shape[0]} tokens")


def store_kv_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """The definition. Which tokens are stored is looked up on the host."""
    used = slots >= 0
    block, offset = slots[used] // k_cache.shape[1], slots[used] % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[used]
        if cache.dtype is FP8:
            x = (x.float() / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8).view(torch.uint8)
            cache = cache.view(torch.uint8)  # not every device can index float8
        cache[block, offset] = x


@triton.jit
def fp32_to_fp8(x):
    """float32 to the bits of e4m3, rounded to nearest even, beyond 448 to 448. Runs on cards without fp8."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # three bits of fraction, bias 7 for 127
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 15  # below 2^-6: steps of 2^-9, the last bit of 2^14
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 127, code)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 128
    return (code | sign).to(tl.int8)


@triton.jit
def _store_kv_kernel(
    K,
    V,
    K_CACHE,
    V_CACHE,
    SLOTS,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kcb,
    stride_kct,
    stride_kch,
    stride_vcb,
    stride_vct,
    stride_vch,
    k_factor,
    v_factor,
    kv_heads,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """BLOCK of the values of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + token)
    if slot < 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head = (at // HEAD_DIM).to(tl.int64)
    dim = at % HEAD_DIM
    inside = head < kv_heads
    k = tl.load(K + token * stride_kt + head * stride_kh + dim, mask=inside)
    v = tl.load(V + token * stride_vt + head * stride_vh + dim, mask=inside)
    if QUANTIZED:
        k = fp32_to_fp8(k.to(tl.float32) / k_factor)
        v = fp32_to_fp8(v.to(tl.float32) / v_factor)
    block = slot // PAGE
    offset = slot % PAGE
    tl.store(K_CACHE + block * stride_kcb + offset * stride_kct + head * stride_kch + dim, k, mask=inside)
    tl.store(V_CACHE + block * stride_vcb + offset * stride_vct + head * stride_vch + dim, v, mask=inside)


@torch.library.custom_op("llava_kernels::store_kv", mutates_args=("k_cache", "v_cache"))
def _store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: float, v_scale: float
) -> None:
    k, v = dense_heads(k), dense_heads(v)
    tokens, kv_heads, head_dim = k.shape
    if not tokens:
        return
    quantized = k_cache.dtype is FP8
    if quantized:
        k_cache, v_cache = k_cache.view(torch.int8), v_cache.view(torch.int8)
    blocks = blocks_for("store_kv", k.device, kv_heads * head_dim)
    with on(k):
        _store_kv_kernel[(tokens, triton.cdiv(kv_heads * head_dim, blocks["BLOCK"]))](
            k, v, k_cache, v_cache, slots.contiguous(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *k_cache.stride()[:3], *v_cache.stride()[:3], k_scale, v_scale, kv_heads,
            PAGE=k_cache.shape[1], HEAD_DIM=head_dim, QUANTIZED=quantized, **blocks,
        )  # fmt: skip


@_store_kv.register_fake
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: float, v_scale: float) -> None:
    return None


def builds(arch: int) -> list[Build]:
    """LLaVA 7B and 13B: 32 or 40 heads of 128; their number is not compiled in."""
    blocks = blocks_on("store_kv", arch, 4096)
    found = []
    for stored, page in (("bf16", 16), ("bf16", 32), ("bf16", 64), ("fp8", 16)):
        cache = "*i8" if stored == "fp8" else "*bf16"
        special = {"K_CACHE": cache, "V_CACHE": cache, "SLOTS": "*i64", "k_factor": "fp32", "v_factor": "fp32"}
        constants = {"PAGE": page, "HEAD_DIM": 128, "BLOCK": blocks["BLOCK"], "QUANTIZED": stored == "fp8"}
        names = [n for n in _store_kv_kernel.arg_names if n not in constants]
        found.append(
            Build(
                name=f"store_kv_page_{page}_{stored}_128",
                kernel=_store_kv_kernel,
                signature={n: special.get(n, "*bf16" if n.isupper() else "i32") for n in names},
                constants=constants,
                num_warps=blocks["num_warps"],
                kind="memory",
                not_aligned=("kv_heads",),
            )
        )
    return found
