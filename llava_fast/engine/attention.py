"""How a step's layers attend: keys and values into the paged cache, then each token over its sequence's."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.kv_cache import FP8, KVCache
from llava_fast.model.decoder import Attend, turned
from llava_kernels import paged_attention, store_kv, varlen_attention
from llava_kernels.attention import rope_store_kv


def decoding(cache: KVCache, sent: dict[str, Tensor], max_context: int) -> Attend:
    """One token a sequence: turned and stored in one launch, then split over the keys."""

    def attend(layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys, values = cache.layers[layer]
        heads = qkv.shape[1] - 2 * keys.shape[2]
        q = rope_store_kv(qkv, cos, sin, keys, values, sent["slots"], heads=heads)
        return paged_attention(
            q, keys, values, sent["block_table"], sent["context_lens"], sent["query_start"],
            max_query=1, max_context=max_context,
        )  # fmt: skip

    return attend


def mixed(cache: KVCache, inputs: StepInputs, sent: dict[str, Tensor], implementation: str) -> Attend:
    """Sequences that decode, then prompts: against the cache as chunks, or packed where none has anything in it yet."""
    decodes, first = inputs.decodes, int(inputs.arrays["query_start"][inputs.decodes])
    tables, contexts, starts = sent["block_table"], sent["context_lens"], sent["query_start"]
    seqlens = [chunk.count for chunk in inputs.chunks[decodes:]]
    prompt_starts = starts[decodes:] - first
    fresh = inputs.fresh and cache.memory.dtype is not FP8  # what an answer sees must not depend on chunks

    def attend(layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys, values = cache.layers[layer]
        q, k, v = turned(qkv, cos, sin, keys.shape[2])
        store_kv(k, v, keys, values, sent["slots"])
        parts = []
        if decodes:
            parts.append(
                paged_attention(
                    q[:first], keys, values, tables[:decodes], contexts[:decodes], starts[: decodes + 1],
                    max_query=1, max_context=inputs.max_context,
                )
            )  # fmt: skip
        if fresh:
            parts.append(
                varlen_attention(
                    q[first:], k[first:], v[first:], seqlens, cu_seqlens=prompt_starts, implementation=implementation
                )
            )
        else:
            parts.append(
                paged_attention(
                    q[first:], keys, values, tables[decodes:], contexts[decodes:], prompt_starts,
                    max_query=inputs.max_query, max_context=inputs.max_context,
                )
            )  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend
