"""rope_store_kv: turn a layer's queries and keys by their positions and store keys and values, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels.attention.paged import FP8
from llava_kernels.attention.store_kv import check_store, fp32_to_fp8, store_kv_reference
from llava_kernels.attention.triton_varlen import on
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.rope import check_angles, pairs_tile, rope_reference
from llava_kernels.tiles import blocks_for, blocks_on


def rope_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    heads: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """``rope_`` on the query and key heads, then ``store_kv``, without the turned keys' way through memory.

    The queries are turned where they lie. Keys and values stay in ``qkv`` as they were: the turned keys are in the
    cache alone. No gradients.

    Args:
        qkv: (T, heads + 2 kv_heads, head_dim), the merged product of one layer: query, key, value heads. Its query
            heads are written over.
        cos, sin: (T, head_dim/2) float32, as :func:`llava_kernels.rope` takes them.
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim) in qkv's dtype or float8_e4m3fn, as
            :func:`llava_kernels.store_kv` takes them; they may lie side by side in one tensor.
        slots: (T,) int64, each at most once; of a token of slot -1 only the queries are turned.
        heads: query heads.
        k_scale, v_scale: of a float8 cache. A turned key is rounded to qkv's dtype first, then to float8.

    Returns:
        (T, heads, head_dim): the turned queries, a view of ``qkv``.

    Raises:
        ValueError: ``qkv`` requires a gradient, or dtypes or shapes do not fit together.
    """
    _check(qkv, cos, sin, k_cache, v_cache, slots, heads)
    if use_triton(qkv):
        torch.ops.llava_kernels.rope_store_kv(qkv, cos, sin, k_cache, v_cache, slots, heads, k_scale, v_scale)
        return qkv[:, :heads]
    return rope_store_kv_reference(qkv, cos, sin, k_cache, v_cache, slots, heads, k_scale, v_scale)


def rope_store_kv_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """The definition. Which tokens are stored is looked up on the host."""
    q, k, v = _parts(qkv, heads, k_cache.shape[2])
    store_kv_reference(rope_reference(k, cos, sin), v, k_cache, v_cache, slots, k_scale, v_scale)
    return q.copy_(rope_reference(q, cos, sin))


def _parts(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slices, not split(): views that split() returns together may not be written to under autograd."""
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, heads: int) -> None:
    if qkv.requires_grad:
        raise ValueError("rope_store_kv overwrites qkv, which requires a gradient; use rope")
    if qkv.dim() != 3 or k_cache.dim() != 4 or heads < 1 or qkv.shape[1] != heads + 2 * k_cache.shape[2]:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} and k_cache {tuple(k_cache.shape)} do not fit together with heads={heads}; "
            "expected (T, heads + 2 kv_heads, head_dim) and (blocks, block_size, kv_heads, head_dim)"
        )
    if qkv.stride(2) != 1:
        raise ValueError("the last dimension of qkv must be dense")
    q, k, v = _parts(qkv, heads, k_cache.shape[2])
    check_angles(q, cos, sin)
    check_store(k, v, k_cache, v_cache, slots)


@triton.jit
def _turned(source, cos, sin, inside, HALF: tl.constexpr):
    """The pairs at ``source`` turned in float32, rounded to the dtype they came in."""
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + HALF, mask=inside, other=0.0)
    left, right = a.to(tl.float32), b.to(tl.float32)
    return (left * cos - right * sin).to(a.dtype), (right * cos + left * sin).to(a.dtype)


@triton.jit
def _store_pairs(target, a, b, factor, inside, HALF: tl.constexpr, QUANTIZED: tl.constexpr):
    if QUANTIZED:
        a = fp32_to_fp8(a.to(tl.float32) / factor)
        b = fp32_to_fp8(b.to(tl.float32) / factor)
    tl.store(target, a, mask=inside)
    tl.store(target + HALF, b, mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads", "kv_heads"])
def _rope_store_kv_kernel(
    QKV,  # (tokens, heads + 2 kv_heads, 2 * HALF)
    COS,  # (tokens, HALF)
    SIN,  # (tokens, HALF)
    K_CACHE,  # (blocks, PAGE, kv_heads, 2 * HALF)
    V_CACHE,
    SLOTS,  # (tokens,)
    stride_t,
    stride_h,
    stride_kcb,
    stride_kct,
    stride_kch,
    stride_vcb,
    stride_vct,
    stride_vch,
    k_factor,
    v_factor,
    tokens,
    heads,
    kv_heads,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,  # head_dim/2
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two from HALF on
    QUANTIZED: tl.constexpr,
):
    """TOKENS tokens, tile after tile of HEADS heads, which are all queries, all keys or all values.

    The grid's second axis, where it is longer than 1, shares a token's tiles between programs. Both elements of a pair
    are loaded by the thread that stores them, which is what lets the queries be turned in place.
    """
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    known = (token < tokens) & (column < HALF)
    slot = tl.load(SLOTS + token, mask=token < tokens, other=-1)  # (TOKENS, 1, 1)
    stored = known & (slot >= 0)
    cos = tl.load(COS + token * HALF + column, mask=known, other=0.0).to(tl.float32)  # (TOKENS, 1, BLOCK)
    sin = tl.load(SIN + token * HALF + column, mask=known, other=0.0).to(tl.float32)
    rows = QKV + token * stride_t + column
    k_place = K_CACHE + slot // PAGE * stride_kcb + slot % PAGE * stride_kct + column
    v_place = V_CACHE + slot // PAGE * stride_vcb + slot % PAGE * stride_vct + column
    first_k = tl.cdiv(heads, HEADS)  # the first tile of keys
    first_v = first_k + tl.cdiv(kv_heads, HEADS)
    lane = tl.arange(0, HEADS).to(tl.int64)[None, :, None]
    for tile in range(tl.program_id(1), 2 * first_v - first_k, tl.num_programs(1)):
        if tile < first_k:
            head = tile * HEADS + lane
            inside = known & (head < heads)
            source = rows + head * stride_h
            a, b = _turned(source, cos, sin, inside, HALF)
            _store_pairs(source, a, b, 1.0, inside, HALF, False)
        elif tile < first_v:
            head = (tile - first_k) * HEADS + lane
            inside = stored & (head < kv_heads)
            a, b = _turned(rows + (heads + head) * stride_h, cos, sin, inside, HALF)
            _store_pairs(k_place + head * stride_kch, a, b, k_factor, inside, HALF, QUANTIZED)
        else:
            head = (tile - first_v) * HEADS + lane
            inside = stored & (head < kv_heads)
            source = rows + (heads + kv_heads + head) * stride_h
            a, b = tl.load(source, mask=inside), tl.load(source + HALF, mask=inside)
            _store_pairs(v_place + head * stride_vch, a, b, v_factor, inside, HALF, QUANTIZED)


@torch.library.custom_op("llava_kernels::rope_store_kv", mutates_args=("qkv", "k_cache", "v_cache"))
def _rope_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    k_scale: float,
    v_scale: float,
) -> None:
    """Returns nothing, because what an op returns may not be a view of what it takes."""
    tokens, _, head_dim = qkv.shape
    if not tokens:
        return
    quantized, kv_heads = k_cache.dtype is FP8, k_cache.shape[2]
    if quantized:
        k_cache, v_cache = k_cache.view(torch.int8), v_cache.view(torch.int8)
    blocks = blocks_for("rope_store_kv", qkv.device, tokens)
    shares = blocks.pop("shares")
    tile = pairs_tile(blocks.pop("pairs"), heads, head_dim)
    tiles = triton.cdiv(heads, tile["HEADS"]) + 2 * triton.cdiv(kv_heads, tile["HEADS"])
    with on(qkv):
        _rope_store_kv_kernel[(triton.cdiv(tokens, tile["TOKENS"]), min(shares, tiles))](
            qkv, cos.contiguous(), sin.contiguous(), k_cache, v_cache, slots.contiguous(), *qkv.stride()[:2],
            *k_cache.stride()[:3], *v_cache.stride()[:3], k_scale, v_scale, tokens, heads, kv_heads,
            PAGE=k_cache.shape[1], QUANTIZED=quantized, **tile, **blocks,
        )  # fmt: skip


@_rope_store_kv.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    k_scale: float,
    v_scale: float,
) -> None:
    return None


def builds(arch: int) -> list[Build]:
    """Heads of 128, as LLaVA's 7B and 13B have, and of 64; how many there are is an argument."""
    kinds = [(stored, page, 128) for stored in ("bf16", "fp8") for page in (16, 32, 64)]
    return [_build(arch, *kind) for kind in (*kinds, ("bf16", 16, 64), ("fp8", 16, 64))]


def _build(arch: int, stored: str, page: int, head_dim: int) -> Build:
    blocks = blocks_on("rope_store_kv", arch, 1 << 14)
    constants = {**pairs_tile(blocks["pairs"], 32, head_dim), "PAGE": page, "QUANTIZED": stored == "fp8"}
    cache = "*i8" if stored == "fp8" else "*bf16"
    special = {
        **{"QKV": "*bf16", "COS": "*fp32", "SIN": "*fp32", "K_CACHE": cache, "V_CACHE": cache, "SLOTS": "*i64"},
        **{"k_factor": "fp32", "v_factor": "fp32"},
    }
    names = [n for n in _rope_store_kv_kernel.arg_names if n not in constants]
    return Build(
        name=f"rope_store_kv_page_{page}_{stored}_{head_dim}",
        kernel=_rope_store_kv_kernel,
        signature={n: special.get(n, "i32") for n in names},
        constants=constants,
        num_warps=blocks["num_warps"],
        kind="memory",
        not_aligned=("tokens", "heads", "kv_heads"),
    )
