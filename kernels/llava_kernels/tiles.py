"""Block sizes per op, card and size: the one table that every launcher reads. Nothing is tuned on the hot path.

tune.py measures new rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Row:
    """The block sizes of one op on one card, for sizes up to a bound.

    Args:
        arch: 80 (A100) or 90 (H100, H200 and later).
        up_to: the largest size (rows, tokens or whatever the op's comment in TABLE says) that the row is for.
        blocks: constexpr arguments of the kernel, with ``num_warps`` and ``num_stages``.
    """

    arch: int
    up_to: int
    blocks: dict[str, int]


ANY = 1 << 62
PROCESSORS = {80: 108, 90: 132}  # A100; H100 SXM and H200
_assumed: ContextVar[int | None] = ContextVar("llava_kernels_assumed_arch", default=None)


def _gemm(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}


def _pair(m: int, n: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


# Rows of an op lie in rising order of up_to within an arch. None of them was measured on a card yet.
TABLE: dict[str, tuple[Row, ...]] = {
    # size: dim. A row lies whole in registers, up to 32 values a thread.
    "rms_norm": tuple(
        Row(arch, up_to, {"ROWS": rows, "num_warps": warps})
        for arch in (80, 90)
        for up_to, rows, warps in ((512, 8, 4), (1024, 4, 4), (2048, 2, 4), (4096, 1, 4), (8192, 1, 8), (ANY, 1, 16))
    ),
    # size: dim. Weight frozen: nothing lasts from row to row, so a program takes one group of rows.
    "rms_norm_backward": tuple(
        Row(arch, up_to, {"ROWS": rows, "STAGES": 1, "num_warps": warps})
        for arch in (80, 90)
        for up_to, rows, warps in ((512, 8, 4), (1024, 4, 4), (2048, 2, 4), (4096, 1, 4), (8192, 1, 8), (ANY, 1, 16))
    ),
    # size: bytes of a row of x. Weight trained: few programs, so that its partial sums are few; the stages, whose rows
    # lie in shared memory, keep the memory busy.
    "rms_norm_backward_weight": tuple(
        Row(arch, up_to, {"ROWS": rows, "STAGES": stages, "num_warps": warps, "programs_per_processor": programs})
        for arch in (80, 90)
        for up_to, rows, stages, warps, programs in (
            *((1 << 10, 8, 3, 8, 2), (1 << 11, 4, 3, 8, 2), (1 << 12, 2, 3, 8, 2)),
            *((1 << 13, 1, 3, 8, 2), (1 << 14, 1, 3, 16, 1), (ANY, 1, 1, 16, 1)),
        )
    ),
    # size: tokens. Few tokens: a token's heads are shared between programs, so that none waits for several rounds.
    "rope": tuple(
        Row(arch, up_to, {"pairs": 1024, "shares": shares, "num_warps": 4})
        for arch in (80, 90)
        for up_to, shares in ((256, 8), (ANY, 1))
    ),
    # size: tokens. pairs and shares as rope's.
    "rope_store_kv": tuple(
        Row(arch, up_to, {"pairs": 1024, "shares": shares, "num_warps": 4})
        for arch in (80, 90)
        for up_to, shares in ((256, 8), (ANY, 1))
    ),
    # size: inner
    "swiglu": tuple(
        Row(arch, up_to, {"BLOCK": block, "num_warps": 4})
        for arch in (80, 90)
        for up_to, block in ((1024, 1024), (ANY, 2048))
    ),
    # size: values of a row, all of which a program holds
    "round_rows": tuple(
        Row(arch, up_to, {"num_warps": warps})
        for arch in (80, 90)
        for up_to, warps in ((1024, 2), (4096, 4), (16384, 8), (ANY, 16))
    ),
    # size: image rows. One image gets small tiles, so that every multiprocessor has one; COPY_*: text rows a program.
    "project_splice": (
        Row(80, 1024, _gemm(64, 128, 64, 4, 4) | {"COPY_ROWS": 8, "COPY_COLUMNS": 1024}),
        Row(80, ANY, _gemm(128, 256, 64, 8, 4) | {"COPY_ROWS": 16, "COPY_COLUMNS": 1024}),
        Row(90, 1024, _gemm(64, 128, 64, 4, 4) | {"COPY_ROWS": 8, "COPY_COLUMNS": 1024}),
        Row(90, ANY, _gemm(128, 256, 64, 8, 4) | {"COPY_ROWS": 16, "COPY_COLUMNS": 1024}),
    ),
    "project_splice_fp32": tuple(
        Row(arch, ANY, _gemm(64, 64, 32, 4, 2) | {"COPY_ROWS": 8, "COPY_COLUMNS": 512}) for arch in (80, 90)
    ),
    # size: vocabulary
    "cross_entropy": tuple(
        Row(arch, up_to, {"BLOCK": block, "num_warps": warps})
        for arch in (80, 90)
        for up_to, block, warps in ((1024, 1024, 4), (8192, 4096, 8), (ANY, 8192, 16))
    ),
    # size: vocabulary. One program a row, whatever the number of rows, so it takes many threads.
    "sample": tuple(
        Row(arch, up_to, {"BLOCK": block, "num_warps": warps})
        for arch in (80, 90)
        for up_to, block, warps in ((1024, 1024, 4), (8192, 2048, 8), (ANY, 4096, 16))
    ),
    # size: image rows, which the products below sum over or whose gradient they are
    "project_splice_weight_grad": (
        Row(80, ANY, _gemm(128, 64, 64, 4, 5)),
        Row(90, ANY, _gemm(128, 256, 64, 8, 5)),
    ),
    "project_splice_weight_grad_fp32": tuple(Row(arch, ANY, _gemm(64, 64, 32, 4, 2)) for arch in (80, 90)),
    "project_splice_feature_grad": (
        Row(80, 1024, _gemm(64, 128, 64, 4, 4)),
        Row(80, ANY, _gemm(128, 256, 64, 8, 4)),
        Row(90, 1024, _gemm(64, 128, 64, 4, 4)),
        Row(90, ANY, _gemm(128, 256, 64, 8, 4)),
    ),
    "project_splice_feature_grad_fp32": tuple(Row(arch, ANY, _gemm(64, 64, 32, 4, 2)) for arch in (80, 90)),
    # size: text rows
    "project_splice_embedding_grad": tuple(
        Row(arch, ANY, {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 1024, "num_warps": 4}) for arch in (80, 90)
    ),
    # size: rows. Small enough for two programs a multiprocessor: one computes GELUs while the other's products run.
    "linear_gelu": (
        Row(80, ANY, _gemm(128, 128, 32, 8, 4)),
        Row(90, ANY, _gemm(128, 128, 64, 8, 3)),
    ),
    "linear_gelu_fp32": tuple(Row(arch, ANY, _gemm(64, 64, 32, 4, 2)) for arch in (80, 90)),
    # The same tile on both. Half the depth on the A100, eight warps on the H100: 168 and 101 registers a thread, where
    # four warps and a depth of 64 took all 255 under Triton 3.6.
    "linear_gelu_backward": (
        Row(80, ANY, _gemm(128, 64, 32, 4, 5)),
        Row(90, ANY, _gemm(128, 64, 64, 8, 3)),
    ),
    "linear_gelu_backward_fp32": tuple(Row(arch, ANY, _gemm(64, 64, 32, 4, 2)) for arch in (80, 90)),
    # size: the head's, padded to a power of two. BLOCK_M queries and BLOCK_N keys.
    "varlen_attention_forward": (
        Row(80, 64, _pair(128, 64, 8, 3)),
        Row(80, 128, _pair(128, 32, 8, 4)),
        Row(90, 64, _pair(128, 128, 8, 3)),
        Row(90, 128, _pair(128, 128, 8, 2)),
    ),
    "varlen_attention_d_kv": (
        Row(80, 64, _pair(64, 64, 8, 2)),
        Row(80, 128, _pair(64, 64, 8, 2)),
        Row(90, 64, _pair(64, 128, 8, 2)),
        Row(90, 128, _pair(32, 128, 8, 3)),
    ),
    "varlen_attention_d_q": (
        Row(80, 64, _pair(128, 64, 8, 2)),
        Row(80, 128, _pair(128, 32, 8, 3)),
        Row(90, 64, _pair(128, 64, 8, 2)),
        Row(90, 128, _pair(128, 32, 8, 3)),
    ),
    # size: rows, the queries of a sequence times the heads that share a key head. Up to 16 is decoding.
    "paged_attention": tuple(
        Row(arch, up_to, _pair(rows, 64, warps, 3))
        for arch, most in ((80, 8), (90, 4))
        for up_to, rows, warps in ((16, 16, 4), (32, 32, 4), (ANY, 64, most))
    ),
    "paged_attention_fp32": tuple(
        Row(arch, up_to, _pair(rows, 32, 4, 2)) for arch in (80, 90) for up_to, rows in ((16, 16), (ANY, 32))
    ),
    # size: values of a token's keys
    "store_kv": tuple(Row(arch, ANY, {"BLOCK": 1024, "num_warps": 4}) for arch in (80, 90)),
    "varlen_attention_delta": tuple(
        Row(arch, 128, {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}) for arch in (80, 90)
    ),
    "varlen_attention_forward_fp32": tuple(Row(arch, 128, _pair(32, 32, 4, 2)) for arch in (80, 90)),
    "varlen_attention_d_kv_fp32": tuple(Row(arch, 128, _pair(32, 32, 4, 1)) for arch in (80, 90)),
    "varlen_attention_d_q_fp32": tuple(Row(arch, 128, _pair(32, 32, 4, 1)) for arch in (80, 90)),
    "varlen_attention_delta_fp32": tuple(
        Row(arch, 128, {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}) for arch in (80, 90)
    ),
    # size: output features. programs: how many fill the card; a weight too small for them is split along K, each split
    # at least MIN_STEPS tiles long.
    "quantized_row": tuple(
        Row(arch, ANY, {"BLOCK_N": 8, "BLOCK_WORDS": 512, "programs": programs, "MIN_STEPS": 1, "num_warps": 4})
        for arch, programs in ((80, 216), (90, 264))
    ),
    # size: rows of x
    "quantized_rows": tuple(
        Row(arch, m, _pair(m, n, warps, stages) | {"programs": programs, "MIN_STEPS": 4})
        for arch, programs, m, n, warps, stages in (
            *((80, 216, 16, 64, 4, 4), (80, 216, 32, 64, 4, 3), (80, 216, 64, 128, 8, 4)),
            *((90, 264, 16, 64, 4, 4), (90, 264, 32, 64, 4, 4), (90, 264, 64, 128, 8, 4)),
        )
    ),
    "quantized_rows_fp32": tuple(
        Row(arch, m, _pair(m, 64, warps, 2) | {"programs": programs, "MIN_STEPS": 4})
        for arch, programs in ((80, 216), (90, 264))
        for m, warps in ((16, 4), (32, 4), (64, 8))
    ),
    # size: rows times output features
    "quantized_sum_splits": tuple(Row(arch, ANY, {"BLOCK_SIZE": 1024, "num_warps": 4}) for arch in (80, 90)),
    # size: output features
    "quantized_dequantize": tuple(Row(arch, ANY, {"BLOCK_N": 64, "num_warps": 4}) for arch in (80, 90)),
}


def blocks_for(op: str, device: torch.device, size: int) -> dict[str, int]:
    """The block sizes with which ``op`` is launched on ``device`` for ``size``.

    Raises:
        KeyError: the table has no row for the op.
    """
    return blocks_on(op, arch_of(device), size)


def blocks_on(op: str, arch: int, size: int) -> dict[str, int]:
    """The same by architecture (80 or 90), for compiling ahead of time."""
    return dict(_blocks(op, arch, size))


@contextmanager
def assume(arch: int) -> Iterator[None]:
    """Within the block, launches are made out for a card of this architecture (80 or 90), whatever the device is."""
    token = _assumed.set(arch)
    try:
        yield
    finally:
        _assumed.reset(token)


def arch_of(device: torch.device) -> int:
    """80 or 90: whose rows hold for the device. The interpreter on a CPU takes the A100's."""
    if (arch := _assumed.get()) is not None:
        return arch
    return 90 if device.type == "cuda" and _capability(device.index or 0) >= 9 else 80


def processors_of(device: torch.device) -> int:
    """Its multiprocessors; 1 of a CPU."""
    if (arch := _assumed.get()) is not None:
        return PROCESSORS[arch]
    return _processors(device) if device.type == "cuda" else 1


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


@cache
def _blocks(op: str, arch: int, size: int) -> dict[str, int]:
    return next(row.blocks for row in TABLE[op] if row.arch == arch and size <= row.up_to)
