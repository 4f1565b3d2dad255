"""varlen_attention by xformers' memory_efficient_attention under a block-diagonal mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llava_kernels.attention.backend import Backend, unfit_for_flash


def load() -> Any:
    import xformers.ops
    import xformers.ops.fmha.attn_bias

    return xformers.ops


def attend(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    ops = load()
    masks = ops.fmha.attn_bias
    mask = masks.BlockDiagonalCausalMask if causal else masks.BlockDiagonalMask
    bias = mask.from_seqlens(list(seqlens), device=q.device)
    q4, k4, v4 = (x.unsqueeze(0) for x in (q, k, v))  # (1, T, heads, head_dim)
    group = q.shape[1] // k.shape[1]
    if group > 1:  # grouped heads: (1, T, kv_heads, group, head_dim), keys and values repeated by a stride of zero
        q4 = q4.unflatten(2, (-1, group))
        k4, v4 = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k4, v4))
    return ops.memory_efficient_attention(q4, k4, v4, attn_bias=bias).reshape(q.shape)


XFORMERS = Backend(attend=attend, unfit=unfit_for_flash, load=load, install="pip install 'llava-fast[xformers]'")
