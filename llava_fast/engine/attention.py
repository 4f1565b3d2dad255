"""How a step's layers attend: keys and values into the paged cache, then each token over its sequence's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.kv_cache import KVCache
from llava_kernels import paged_attention, store_kv, varlen_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def paged(cache: KVCache, inputs: StepInputs, sent: dict[str, Tensor], implementation: str) -> Attend:
    """By the kernels: decodes split over their keys, prompts as chunks against the cache, whole prompts packed."""
    decodes, first = inputs.decodes, int(inputs.arrays["query_start"][inputs.decodes])
    tables, contexts, starts = sent["block_table"], sent["context_lens"], sent["query_start"]
    seqlens = [c.count for c in inputs.chunks[decodes:]]
    fresh = inputs.fresh and cache.memory.dtype is not torch.float8_e4m3fn

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.layers[layer]
        store_kv(k, v, keys, values, sent["slots"])
        parts = []
        if decodes:
            parts.append(
                paged_attention(
                    q[:first], keys, values, tables[:decodes], contexts[:decodes], starts[: decodes + 1],
                    max_query=1, max_context=inputs.max_context,
                )
            )  # fmt: skip
        if seqlens and fresh:
            cu_seqlens = starts[decodes:] - first
            parts.append(
                varlen_attention(
                    q[first:], k[first:], v[first:], seqlens, cu_seqlens=cu_seqlens, implementation=implementation
                )
            )
        elif seqlens:
            parts.append(
                paged_attention(
                    q[first:], keys, values, tables[decodes:], contexts[decodes:], starts[decodes:] - first,
                    max_query=inputs.max_query, max_context=inputs.max_context,
                )
            )  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend
