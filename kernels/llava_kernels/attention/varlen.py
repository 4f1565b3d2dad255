"""varlen_attention: attention inside each of the sequences that lie end to end in a packed batch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], *, causal: bool = True, implementation: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v within each sequence, never across a boundary.

    Args:
        q: (T, heads, head_dim).
        k, v: (T, kv_heads, head_dim); heads is a multiple of kv_heads (grouped-query attention).
        seqlens: lengths of the sequences, on the host; their sum is T.
        causal: a token sees itself and what comes before it.
        implementation: a name in IMPLEMENTATIONS, or "auto".

    Returns:
        (T, heads, head_dim).
    """
    attend = IMPLEMENTATIONS["sdpa" if implementation == "auto" else implementation]
    lengths = list(seqlens)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend(*part, causal) for part in parts])


def _reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The definition, for one sequence of n tokens, with the scores in float32."""
    n, heads, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) / head_dim**0.5  # (heads, n, n)
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1).to(v.dtype), v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's own, which picks the fastest of its kernels for the device."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, n, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "reference": _reference,
    "sdpa": _sdpa,
}
