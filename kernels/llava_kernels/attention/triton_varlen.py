"""varlen_attention in Triton: FlashAttention-2 (Dao, arXiv 2307.08691) forward and deterministic backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels.attention.backend import Backend, on_device
from llava_kernels.build import Build, Kind
from llava_kernels.tiles import blocks_for, blocks_on

LARGEST_HEAD = 128
LOG2E = math.log2(math.e)


def attend(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    ends = on_device(seqlens, cu_seqlens, q.device)
    return torch.ops.llava_kernels.varlen_attention(q, k, v, ends, max(seqlens), causal)[0]


def unfit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and dtype is torch.bfloat16:
        return "is wrong in bfloat16 under Triton's interpreter; use float32 or float16"
    if head_dim > LARGEST_HEAD:
        return f"takes head sizes up to {LARGEST_HEAD}, not {head_dim}"
    return None


TRITON = Backend(attend=attend, unfit=unfit)


# Scores are kept in units of log 2 throughout, since exp2 is what the hardware has: s = q k^T / sqrt(d) * log2(e).


@triton.jit
def _load_rows(base, stride, count, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D): rows from ``base`` on; zeros for rows from ``count`` on and beyond the head's size."""
    rows = tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = rows < count
    if HEAD_DIM != BLOCK_D:
        inside &= dims < HEAD_DIM
    return tl.load(base + rows * stride + dims, mask=inside, other=0.0)


@triton.jit
def _store_rows(base, stride, count, x, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = rows < count
    if HEAD_DIM != BLOCK_D:
        inside &= dims < HEAD_DIM
    tl.store(base + rows * stride + dims, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _forward_blocks(
    acc,  # (BLOCK_M, BLOCK_D) sum of p v
    norm,  # (BLOCK_M,) sum of p
    top,  # (BLOCK_M,) largest score so far
    q,
    K,
    V,
    stride_kt,
    stride_vt,
    scale,
    start,  # int64, so that the rows' offsets are
    length,
    m0,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys first..last for BLOCK_M queries; ``MASKED`` where some of them are not seen by every query."""
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n0 in tl.range(first, last, BLOCK_N):
        k = _load_rows(K + (start + n0) * stride_kt, stride_kt, length - n0, BLOCK_N, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BLOCK_M, BLOCK_N)
        if MASKED:
            cols = n0 + tl.arange(0, BLOCK_N)[None, :]
            seen = cols <= rows if CAUSAL else cols < length
            s = tl.where(seen, s, float("-inf"))
        # Every query has seen a key by the first block, so new_top is finite.
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        norm = norm * shrink + tl.sum(p, 1)
        v = _load_rows(V + (start + n0) * stride_vt, stride_vt, length - n0, BLOCK_N, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, norm, top


@triton.jit(do_not_specialize=["total", "blocks"])
def _varlen_forward_kernel(
    Q,
    K,
    V,
    OUT,  # (T, heads, HEAD_DIM)
    LSE,  # (heads, T) log2 of the sum of 2^s
    ENDS,  # (S+1,)
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,
    heads,
    total,
    blocks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    m0 = (blocks - 1 - pid % blocks) * BLOCK_M  # the last blocks of a causal sequence have the most work: first
    head = (pid // blocks % heads).to(tl.int64)  # a head's offset may be beyond int32: (heads, T, dim) transposed
    sequence = pid // blocks // heads
    start = tl.load(ENDS + sequence).to(tl.int64)
    length = (tl.load(ENDS + sequence + 1) - start).to(tl.int32)
    if m0 >= length:
        return
    Q += (start + m0) * stride_qt + head * stride_qh
    K += head // GROUP * stride_kh
    V += head // GROUP * stride_vh
    q = _load_rows(Q, stride_qt, length - m0, BLOCK_M, HEAD_DIM, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Keys that every query of the block sees, then the rest.
    last = tl.minimum(length, m0 + BLOCK_M) if CAUSAL else length
    whole = m0 // BLOCK_N * BLOCK_N if CAUSAL else length // BLOCK_N * BLOCK_N
    acc, norm, top = _forward_blocks(
        acc, norm, top, q, K, V, stride_kt, stride_vt, scale, start, length, m0, 0, whole,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, False, PRECISION,
    )  # fmt: skip
    acc, norm, top = _forward_blocks(
        acc, norm, top, q, K, V, stride_kt, stride_vt, scale, start, length, m0, whole, last,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, True, PRECISION,
    )  # fmt: skip
    OUT += ((start + m0) * heads + head) * HEAD_DIM
    _store_rows(OUT, heads * HEAD_DIM, length - m0, acc / norm[:, None], BLOCK_M, HEAD_DIM, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    tl.store(LSE + head * total + start + m0 + rows, top + tl.log2(norm), mask=rows < length - m0)


@triton.jit(do_not_specialize=["total"])
def _varlen_delta_kernel(
    OUT,  # (T, heads, HEAD_DIM)
    D_OUT,  # the same shape
    DELTA,  # (heads, T) sum of out * d_out over the head, which every score's gradient subtracts
    stride_t,
    stride_h,
    total,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    m0 = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    OUT += (m0.to(tl.int64) * heads + head) * HEAD_DIM
    D_OUT += m0.to(tl.int64) * stride_t + head * stride_h
    out = _load_rows(OUT, heads * HEAD_DIM, total - m0, BLOCK_M, HEAD_DIM, BLOCK_D).to(tl.float32)
    d_out = _load_rows(D_OUT, stride_t, total - m0, BLOCK_M, HEAD_DIM, BLOCK_D).to(tl.float32)
    rows = m0 + tl.arange(0, BLOCK_M)
    tl.store(DELTA + head * total + rows, tl.sum(out * d_out, 1), mask=rows < total)


@triton.jit(do_not_specialize=["total", "blocks"])
def _varlen_d_kv_kernel(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    D_K,  # (T, kv_heads, HEAD_DIM)
    D_V,
    ENDS,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    scale,
    d_scale,
    kv_heads,
    total,
    blocks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys: all queries that see it, of all heads of its group, in order, so no atomics."""
    pid = tl.program_id(0)
    n0 = pid % blocks * BLOCK_N
    kv_head = (pid // blocks % kv_heads).to(tl.int64)
    sequence = pid // blocks // kv_heads
    start = tl.load(ENDS + sequence).to(tl.int64)
    length = (tl.load(ENDS + sequence + 1) - start).to(tl.int32)
    if n0 >= length:
        return
    K += (start + n0) * stride_kt + kv_head * stride_kh
    V += (start + n0) * stride_vt + kv_head * stride_vh
    k = _load_rows(K, stride_kt, length - n0, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = _load_rows(V, stride_vt, length - n0, BLOCK_N, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    cols = n0 + tl.arange(0, BLOCK_N)[:, None]
    first = n0 // BLOCK_M * BLOCK_M if CAUSAL else 0
    for i in range(GROUP):
        head = kv_head * GROUP + i
        Q_HEAD = Q + head * stride_qh
        D_OUT_HEAD = D_OUT + head * stride_oh
        LSE_HEAD = LSE + head * total + start
        DELTA_HEAD = DELTA + head * total + start
        # Queries beyond the sequence are zeros and add nothing. One loop with a mask, because a second loop without it
        # costs registers that are not there.
        for m0 in tl.range(first, length, BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            q = _load_rows(Q_HEAD + (start + m0) * stride_qt, stride_qt, length - m0, BLOCK_M, HEAD_DIM, BLOCK_D)
            lse = tl.load(LSE_HEAD + rows, mask=rows < length, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # (BLOCK_N, BLOCK_M)
            p = tl.exp2(s - lse[None, :])
            if CAUSAL:
                p = tl.where(cols <= rows[None, :], p, 0.0)
            d_out = _load_rows(
                D_OUT_HEAD + (start + m0) * stride_ot, stride_ot, length - m0, BLOCK_M, HEAD_DIM, BLOCK_D
            )
            dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
            delta = tl.load(DELTA_HEAD + rows, mask=rows < length, other=0.0)
            ds = p * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    D_K += ((start + n0) * kv_heads + kv_head) * HEAD_DIM
    D_V += ((start + n0) * kv_heads + kv_head) * HEAD_DIM
    _store_rows(D_K, kv_heads * HEAD_DIM, length - n0, dk * d_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_rows(D_V, kv_heads * HEAD_DIM, length - n0, dv, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _d_q_blocks(
    dq,  # (BLOCK_M, BLOCK_D)
    q,
    d_out,
    lse,
    delta,
    K,
    V,
    stride_kt,
    stride_vt,
    scale,
    start,  # int64, so that the rows' offsets are
    length,
    m0,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n0 in tl.range(first, last, BLOCK_N):
        k = _load_rows(K + (start + n0) * stride_kt, stride_kt, length - n0, BLOCK_N, HEAD_DIM, BLOCK_D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])  # (BLOCK_M, BLOCK_N)
        if MASKED:
            cols = n0 + tl.arange(0, BLOCK_N)[None, :]
            seen = cols <= rows if CAUSAL else cols < length
            p = tl.where(seen, p, 0.0)
        v = _load_rows(V + (start + n0) * stride_vt, stride_vt, length - n0, BLOCK_N, HEAD_DIM, BLOCK_D)
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["total", "blocks"])
def _varlen_d_q_kernel(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    D_Q,  # (T, heads, HEAD_DIM)
    ENDS,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    scale,
    d_scale,
    heads,
    total,
    blocks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    m0 = (blocks - 1 - pid % blocks) * BLOCK_M
    head = (pid // blocks % heads).to(tl.int64)
    sequence = pid // blocks // heads
    start = tl.load(ENDS + sequence).to(tl.int64)
    length = (tl.load(ENDS + sequence + 1) - start).to(tl.int32)
    if m0 >= length:
        return
    Q += (start + m0) * stride_qt + head * stride_qh
    D_OUT += (start + m0) * stride_ot + head * stride_oh
    K += head // GROUP * stride_kh
    V += head // GROUP * stride_vh
    q = _load_rows(Q, stride_qt, length - m0, BLOCK_M, HEAD_DIM, BLOCK_D)
    d_out = _load_rows(D_OUT, stride_ot, length - m0, BLOCK_M, HEAD_DIM, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    at = head * total + start + m0
    lse = tl.load(LSE + at + rows, mask=rows < length - m0, other=0.0)
    delta = tl.load(DELTA + at + rows, mask=rows < length - m0, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(length, m0 + BLOCK_M) if CAUSAL else length
    whole = m0 // BLOCK_N * BLOCK_N if CAUSAL else length // BLOCK_N * BLOCK_N
    dq = _d_q_blocks(
        dq, q, d_out, lse, delta, K, V, stride_kt, stride_vt, scale, start, length, m0, 0, whole,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, False, PRECISION,
    )  # fmt: skip
    dq = _d_q_blocks(
        dq, q, d_out, lse, delta, K, V, stride_kt, stride_vt, scale, start, length, m0, whole, last,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, True, PRECISION,
    )  # fmt: skip
    D_Q += ((start + m0) * heads + head) * HEAD_DIM
    _store_rows(D_Q, heads * HEAD_DIM, length - m0, dq * d_scale, BLOCK_M, HEAD_DIM, BLOCK_D)


def on(x: Tensor) -> Any:
    """Launches go to the tensor's card, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def blocks_of(op: str, x: Tensor) -> dict[str, int]:
    """Block sizes from the table, whose size is the padded head; float32 has rows of its own."""
    return blocks_for(op + ("_fp32" if x.dtype is torch.float32 else ""), x.device, padded(x.shape[-1]))


def padded(head_dim: int) -> int:
    """Tensor cores take 16 and powers of two."""
    return max(16, triton.next_power_of_2(head_dim))


def precision_of(x: Tensor) -> str:
    """float32 products are exact: a model in float32 is meant for comparison, not for speed."""
    return "ieee" if x.dtype is torch.float32 else "tf32"


def dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q: Tensor, k: Tensor, causal: bool) -> dict[str, Any]:
    head_dim = q.shape[-1]
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "CAUSAL": causal,
        "PRECISION": precision_of(q),
    }


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (dense_heads(x) for x in (q, k, v))
    tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    blocks = blocks_of("varlen_attention_forward", q)
    per_sequence = triton.cdiv(longest, blocks["BLOCK_M"])
    grid = (per_sequence * heads * (ends.shape[0] - 1),)
    if tokens and grid[0]:
        with on(q):
            _varlen_forward_kernel[grid](
                q, k, v, out, lse, ends,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                LOG2E / head_dim**0.5, heads, tokens, per_sequence, **_constants(q, k, causal), **blocks,
            )  # fmt: skip
    return out, lse


def _launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor,
    longest: int,
    causal: bool,
    want_q: bool,
    want_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, q, k, v = (dense_heads(x) for x in (d_out, q, k, v))
    tokens, heads, head_dim = q.shape
    dq = torch.empty(q.shape if want_q else (0,), dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape if want_kv else (0,), dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    sequences = ends.shape[0] - 1
    if not tokens or not sequences:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    strides = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), d_out.stride(0), d_out.stride(1),
    )  # fmt: skip
    scales = (LOG2E / head_dim**0.5, 1 / head_dim**0.5)
    constants = _constants(q, k, causal)
    with on(q):
        blocks = blocks_of("varlen_attention_delta", q)
        _varlen_delta_kernel[(triton.cdiv(tokens, blocks["BLOCK_M"]), heads)](
            out, d_out, delta, d_out.stride(0), d_out.stride(1), tokens, heads,
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), **blocks,
        )  # fmt: skip
        if want_kv:
            blocks = blocks_of("varlen_attention_d_kv", q)
            per_sequence = triton.cdiv(longest, blocks["BLOCK_N"])
            _varlen_d_kv_kernel[(per_sequence * k.shape[1] * sequences,)](
                q, k, v, d_out, lse, delta, dk, dv, ends, *strides, *scales, k.shape[1], tokens, per_sequence,
                **constants, **blocks,
            )  # fmt: skip
        if want_q:
            blocks = blocks_of("varlen_attention_d_q", q)
            per_sequence = triton.cdiv(longest, blocks["BLOCK_M"])
            _varlen_d_q_kernel[(per_sequence * heads * sequences,)](
                q, k, v, d_out, lse, delta, dq, ends, *strides, *scales, heads, tokens, per_sequence,
                **constants, **blocks,
            )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("llava_kernels::varlen_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, v, cu_seqlens, max_seqlen, causal)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("llava_kernels::varlen_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    want_q: bool,
    want_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_backward(d_out, q, k, v, out, lse, cu_seqlens, max_seqlen, causal, want_q, want_kv)


@_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    want_q: bool,
    want_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dk = q.new_empty(k.shape if want_kv else (0,))
    return q.new_empty(q.shape if want_q else (0,)), dk, torch.empty_like(dk)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, ctx.longest, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, ends)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    want_q, want_k, want_v = ctx.needs_input_grad[:3]
    q, k, v, out, lse, ends = ctx.saved_tensors
    dq, dk, dv = torch.ops.llava_kernels.varlen_attention_backward(
        d_out, q, k, v, out, lse, ends, ctx.longest, ctx.causal, want_q, want_k or want_v
    )
    return dq if want_q else None, dk if want_k else None, dv if want_v else None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def builds(arch: int) -> list[Build]:
    """Heads of 128 without groups, as LLaVA's 7B and 13B have; the number of heads is not compiled in."""
    found = [_build("delta", _varlen_delta_kernel, arch, None, "memory")]
    for causal in (True, False):
        found += [
            _build("forward", _varlen_forward_kernel, arch, causal, "gemm"),
            _build("d_kv", _varlen_d_kv_kernel, arch, causal, "gemm"),
            _build("d_q", _varlen_d_q_kernel, arch, causal, "gemm"),
        ]
    return found


def _build(part: str, kernel: Any, arch: int, causal: bool | None, kind: Kind) -> Build:
    blocks = blocks_on(f"varlen_attention_{part}", arch, 128)
    constants: dict[str, Any] = {n: b for n, b in blocks.items() if n.isupper()} | {"HEAD_DIM": 128, "BLOCK_D": 128}
    if causal is not None:
        constants |= {"GROUP": 1, "CAUSAL": causal, "PRECISION": "tf32"}
    special = {"LSE": "*fp32", "DELTA": "*fp32", "ENDS": "*i32", "scale": "fp32", "d_scale": "fp32"}
    return Build(
        name=f"varlen_attention_{part}{ {None: '', True: '_causal', False: '_full'}[causal] }_bf16_128",
        kernel=kernel,
        signature={
            n: special.get(n, "*bf16" if n.isupper() else "i32") for n in kernel.arg_names if n not in constants
        },
        constants=constants,
        num_warps=blocks["num_warps"],
        num_stages=blocks["num_stages"],
        kind=kind,
        not_aligned=("total", "blocks"),
    )
