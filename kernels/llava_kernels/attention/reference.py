"""The definition of varlen_attention, one sequence after the other, and torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_kernels.attention.backend import Backend
from llava_kernels.linear import multiplies_in_software


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], cu_seqlens: Tensor | None, causal: bool
) -> Tensor:
    lengths = list(seqlens)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_define(*part, causal) for part in parts])


def _define(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One sequence of n tokens, with the scores in float32."""
    n, heads, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) / head_dim**0.5  # (heads, n, n)
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1).to(v.dtype), v)


def attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], cu_seqlens: Tensor | None, causal: bool
) -> Tensor:
    """torch picks the fastest of its kernels for the device; one launch a sequence."""
    lengths = list(seqlens)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_sdpa(*part, causal) for part in parts])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    dtype = q.dtype
    if multiplies_in_software(q):
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, n, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1).to(dtype)


REFERENCE = Backend(attend=attend_reference)
SDPA = Backend(attend=attend_sdpa)
