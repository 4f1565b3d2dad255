"""paged_attention: attention over a key-value cache that is cut into blocks (Kwon et al., arXiv 2309.06180)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native
from llava_kernels.attention.triton_varlen import LOG2E, dense_heads, on, padded
from llava_kernels.build import Build, Kind
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on, processors_of

FP8 = torch.float8_e4m3fn
MOST_SPLITS = 32
LEAST_KEYS = 128  # a split of fewer costs more in the combining than it gains


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    *,
    max_query: int,
    max_context: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    splits: int | None = None,
) -> Tensor:
    """Attention of each sequence's last tokens over all its tokens in the cache, itself and those after it excluded.

    Query i of a sequence's n stands at position context_len - n + i and sees the keys up to that position, so its own
    key must be stored already (:func:`store_kv`). One query a sequence is decoding, several are a chunk of a prompt;
    both may stand in one call. No gradients.

    Args:
        q: (T, heads, head_dim).
        k_cache, v_cache: (blocks, block_size, kv_heads, head_dim) in q's dtype or float8_e4m3fn; block_size is a power
            of two. A NaN in a float8 cache counts as 480.
        block_table: (S, max_blocks) int32, a sequence's blocks in order; entries beyond its context are not read.
        context_lens: (S,) int32, tokens of each sequence in the cache, its queries included. A query that sees no key
            (context 0, as in the padding of a CUDA graph) gives zeros.
        query_start: (S+1,) int32, where each sequence's queries start in q, then T. A sequence may have none.
        max_query, max_context: bounds known on the host, which decide the grid; what is on the device does not.
        k_scale, v_scale: what the values of a float8 cache are multiplied by.
        splits: in how many parts the keys of a sequence are worked on at a time; None: by the grid's size.

    Returns:
        (T, heads, head_dim) in q's dtype.

    Raises:
        ValueError: dtypes or shapes do not fit together.
    """
    _check(q, k_cache, v_cache, block_table, context_lens, query_start)
    if use_triton(q) or native.use_native(q, k_cache, v_cache):
        return torch.ops.llava_kernels.paged_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            query_start,
            max_query,
            max_context,
            k_scale,
            v_scale,
            splits,
        )
    return paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, query_start, k_scale, v_scale)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """The definition: gather a sequence's keys and values, then torch's attention. Reads the lengths on the host."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts = query_start.tolist()
    for s, context in enumerate(context_lens.tolist()):
        first, last = starts[s], starts[s + 1]
        if first == last or not context:
            continue
        blocks = block_table[s, : math.ceil(context / k_cache.shape[1])].long()
        k, v = (cache[blocks].flatten(0, 1)[:context] for cache in (k_cache, v_cache))  # (context, kv_heads, head_dim)
        if k.dtype is FP8:
            k, v = ((x.float() * scale).to(q.dtype) for x, scale in ((k, k_scale), (v, v_scale)))
        seen = None
        if last - first > 1:
            seen = torch.ones(last - first, context, dtype=torch.bool, device=q.device)
            seen = seen.tril(context - (last - first))
        attended = F.scaled_dot_product_attention(
            q[first:last].transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=seen,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[first:last] = attended.squeeze(0).transpose(0, 1)
    return out


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor, query_start: Tensor
) -> None:
    fit = q.dim() == 3 and k_cache.dim() == 4 and k_cache.shape == v_cache.shape and k_cache.shape[3] == q.shape[2]
    if not fit or q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} do not fit together"
        )
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, FP8):
        raise ValueError(f"the caches are {k_cache.dtype} and {v_cache.dtype}; both must be {q.dtype} or {FP8}")
    if k_cache.shape[1] & (k_cache.shape[1] - 1):
        raise ValueError(f"block_size={k_cache.shape[1]} is not a power of two")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1 or block_table.stride(1) != 1:
        raise ValueError("the last dimension of the caches and of block_table must be dense")
    sequences = context_lens.shape[0]
    if block_table.shape[0] != sequences or query_start.shape[0] != sequences + 1:
        raise ValueError(
            f"block_table has {block_table.shape[0]} rows and query_start {query_start.shape[0]} entries for "
            f"{sequences} sequences; they must be S and S + 1"
        )


@triton.jit
def _fp8_to_fp16(x):
    """The bits of e4m3 as those of a float16: exactly 2^-8 of its value, subnormals too. Runs on cards without fp8."""
    return ((x.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)  # -16385: all bits but the exponent's highest


# What differs from step to step is not compiled in: a step would wait for the compiler. Of the three index tensors the
# engine passes slices, which start anywhere.
@triton.jit(do_not_specialize=["stride_table", "heads"], do_not_specialize_on_alignment=["TABLE", "CONTEXT", "STARTS"])
def _paged_attention_kernel(
    Q,
    K,
    V,
    TABLE,
    CONTEXT,
    STARTS,
    OUT,  # (T, heads, HEAD_DIM); with several splits (T, heads, SPLITS, HEAD_DIM) float32
    LSE,  # (T, heads, SPLITS); not touched with one split
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    scale,
    v_scale,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows, each a query and one of the GROUP heads that share a key head, against one split of the keys."""
    kv_head = tl.program_id(0).to(tl.int64)  # fastest: neighbours read neighbouring memory
    m0 = tl.program_id(1) // SPLITS * BLOCK_M
    split = tl.program_id(1) % SPLITS
    sequence = tl.program_id(2)
    first_query = tl.load(STARTS + sequence)
    queries = tl.load(STARTS + sequence + 1) - first_query
    if m0 >= queries * GROUP:
        return
    before = tl.load(CONTEXT + sequence) - queries  # tokens before the first query
    rows = m0 + tl.arange(0, BLOCK_M)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    inside = rows < queries * GROUP
    token = first_query.to(tl.int64) + query
    in_head = dims < HEAD_DIM
    q = tl.load(
        Q + (token * stride_qt + head * stride_qh)[:, None] + dims[None, :],
        mask=inside[:, None] & in_head[None, :],
        other=0.0,
    )
    if QUANTIZED and q.dtype != tl.float32:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)

    # Keys that the block's last query sees, an equal part for each split.
    end = before + tl.minimum((m0 + BLOCK_M - 1) // GROUP, queries - 1) + 1
    part = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_N) * BLOCK_N
    first = split * part
    end = tl.minimum(first + part, end)
    TABLE += sequence.to(tl.int64) * stride_table
    K += kv_head * stride_kh
    V += kv_head * stride_vh
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for n0 in tl.range(first, end, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        page = tl.load(TABLE + cols // PAGE, mask=cols < end, other=0).to(tl.int64)
        stored = cols < end
        in_cache = stored[:, None] if HEAD_DIM == BLOCK_D else stored[:, None] & in_head[None, :]
        k = tl.load(K + (page * stride_kb + cols % PAGE * stride_kt)[:, None] + dims[None, :], mask=in_cache, other=0)
        if QUANTIZED:
            k = _fp8_to_fp16(k).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BLOCK_M, BLOCK_N)
        s = tl.where(cols[None, :] <= (before + query)[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a query may see none of this split's keys
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        norm = norm * shrink + tl.sum(p, 1)
        v = tl.load(V + (page * stride_vb + cols % PAGE * stride_vt)[:, None] + dims[None, :], mask=in_cache, other=0)
        if QUANTIZED:
            v = _fp8_to_fp16(v).to(q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    norm = tl.where(norm == 0.0, 1.0, norm)  # no keys: a result of 0 and a logarithm of -inf
    out = acc * (v_scale / norm)[:, None]
    row = (token * heads + head) * SPLITS + split
    tl.store(
        OUT + (row * HEAD_DIM)[:, None] + dims[None, :],
        out.to(OUT.dtype.element_ty),
        mask=inside[:, None] & in_head[None, :],
    )
    if SPLITS > 1:
        tl.store(LSE + row, top + tl.log2(norm), mask=inside)


@triton.jit
def _paged_combine_kernel(
    PARTS,  # (rows, SPLITS, HEAD_DIM) float32
    LSE,  # (rows, SPLITS)
    OUT,  # (rows, HEAD_DIM)
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(LSE + row * SPLITS + splits, mask=splits < SPLITS, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    parts = tl.load(
        PARTS + (row * SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :],
        mask=(splits < SPLITS)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + row * HEAD_DIM + dims, out.to(OUT.dtype.element_ty), mask=dims < HEAD_DIM)


def _splits(q: Tensor, kv_heads: int, sequences: int, max_query: int, max_context: int) -> int:
    """Enough programs for two rounds on every multiprocessor, from what the host knows alone."""
    rows = max_query * (q.shape[1] // kv_heads)
    programs = sequences * kv_heads * math.ceil(rows / _blocks(q, rows)["BLOCK_M"])
    wanted = math.ceil(4 * processors_of(q.device) / max(programs, 1))
    return max(1, min(wanted, math.ceil(max_context / LEAST_KEYS), MOST_SPLITS))


def _blocks(q: Tensor, rows: int) -> dict[str, int]:
    return blocks_for("paged_attention" + ("_fp32" if q.dtype is torch.float32 else ""), q.device, rows)


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    max_query: int,
    k_scale: float,
    v_scale: float,
    splits: int,
) -> Tensor:
    q, context_lens, query_start = dense_heads(q), context_lens.contiguous(), query_start.contiguous()
    tokens, heads, head_dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    group, sequences = heads // kv_heads, context_lens.shape[0]
    quantized = k_cache.dtype is FP8
    if quantized:
        k_cache, v_cache = k_cache.view(torch.int8), v_cache.view(torch.int8)
        k_scale, v_scale = k_scale * 256, v_scale * 256  # what _fp8_to_fp16 leaves out
    else:
        k_scale = v_scale = 1.0
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens or not sequences:
        return out
    parts, lse = out, out  # with one split the kernel writes the result and no sums
    if splits > 1:
        parts = torch.empty(tokens, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(tokens, heads, splits, dtype=torch.float32, device=q.device)
    blocks = _blocks(q, max_query * group)
    grid = (kv_heads, triton.cdiv(max_query * group, blocks["BLOCK_M"]) * splits, sequences)
    with on(q):
        _paged_attention_kernel[grid](
            q, k_cache, v_cache, block_table, context_lens, query_start, parts, lse,
            q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0),
            LOG2E / head_dim**0.5 * k_scale, v_scale, heads,
            GROUP=group, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), PAGE=page, SPLITS=splits, QUANTIZED=quantized,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32", **blocks,
        )  # fmt: skip
        if splits > 1:
            _paged_combine_kernel[(tokens * heads,)](
                parts, lse, out, SPLITS=splits, BLOCK_SPLITS=triton.next_power_of_2(splits),
                HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), num_warps=2,
            )  # fmt: skip
    return out


@torch.library.custom_op("llava_kernels::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    max_query: int,
    max_context: int,
    k_scale: float,
    v_scale: float,
    splits: int | None,
) -> Tensor:
    if splits is None:
        splits = _splits(q, k_cache.shape[2], context_lens.shape[0], max_query, max_context)
    return _launch(q, k_cache, v_cache, block_table, context_lens, query_start, max_query, k_scale, v_scale, splits)


@_paged_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    max_query: int,
    max_context: int,
    k_scale: float,
    v_scale: float,
    splits: int | None,
) -> Tensor:
    return q.new_empty(q.shape)


def _on_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    max_query: int,
    max_context: int,
    k_scale: float,
    v_scale: float,
    splits: int | None,
) -> Tensor:
    known = q.dtype == k_cache.dtype in (torch.float32, torch.bfloat16) and native.available()
    if known and native.takes_attention(q, k_cache, v_cache, context_lens, query_start):
        return native.paged_attention(q, k_cache, v_cache, block_table, context_lens, query_start, max_query)
    return paged_attention_reference(q, k_cache, v_cache, block_table, context_lens, query_start, k_scale, v_scale)


native.runs_on_cpu(_paged_attention, _on_cpu)


def builds(arch: int) -> list[Build]:
    """Heads of 128 without groups, as LLaVA's 7B and 13B have: decoding whole and split, and chunks of a prompt."""
    found = [
        Build(
            name="paged_attention_combine_8_bf16_128",
            kernel=_paged_combine_kernel,
            signature={"PARTS": "*fp32", "LSE": "*fp32", "OUT": "*bf16"},
            constants={"SPLITS": 8, "BLOCK_SPLITS": 8, "HEAD_DIM": 128, "BLOCK_D": 128},
            num_warps=2,
            kind="memory",
        )
    ]
    for page in (16, 32, 64):
        found.append(_build(arch, "decode", 1, page, 1, "bf16", "memory"))
    found.append(_build(arch, "decode", 1, 16, 8, "bf16", "memory"))
    found.append(_build(arch, "decode", 1, 16, 1, "fp8", "memory"))
    found.append(_build(arch, "prefill", 512, 16, 1, "bf16", "gemm"))
    found.append(_build(arch, "prefill", 512, 16, 1, "fp8", "gemm"))
    return found


def _build(arch: int, work: str, rows: int, page: int, splits: int, stored: str, kind: Kind) -> Build:
    blocks = blocks_on("paged_attention", arch, rows)
    constants: dict[str, Any] = {n: b for n, b in blocks.items() if n.isupper()}
    constants |= {"GROUP": 1, "HEAD_DIM": 128, "BLOCK_D": 128, "PAGE": page, "SPLITS": splits}
    constants |= {"QUANTIZED": stored == "fp8", "PRECISION": "tf32"}
    cached, whole = "*i8" if stored == "fp8" else "*bf16", splits == 1
    special = {
        **{"K": cached, "V": cached, "scale": "fp32", "v_scale": "fp32"},
        **{"TABLE": "*i32", "CONTEXT": "*i32", "STARTS": "*i32"},
        **{"OUT": "*bf16" if whole else "*fp32", "LSE": "*bf16" if whole else "*fp32"},
    }
    names = [n for n in _paged_attention_kernel.arg_names if n not in constants]
    return Build(
        name=f"paged_attention_{work}_{splits}_page_{page}_{stored}_128",
        kernel=_paged_attention_kernel,
        signature={n: special.get(n, "*bf16" if n.isupper() else "i32") for n in names},
        constants=constants,
        num_warps=blocks["num_warps"],
        num_stages=blocks["num_stages"],
        kind=kind,
        not_aligned=("TABLE", "CONTEXT", "STARTS", "stride_table", "heads"),
    )
