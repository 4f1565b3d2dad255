"""How a step's layers attend: keys and values into the paged cache, then each token over its sequence's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.kv_cache import KVCache
from llava_kernels import paged_attention, store_kv, varlen_attention

GATHER_BYTES = 1 << 18  # keys of one sequence and layer that are copied sooner than torch is called once more

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


def on_host(cache: KVCache, inputs: StepInputs) -> Attend:
    """The same on a CPU by torch's attention, where the lengths need no copy: what can be worked out once for all
    layers is. A sequence whose blocks lie in one piece is read where it lies; many short ones are gathered into one
    padded call."""
    slots = torch.from_numpy(inputs.arrays["slots"])
    piece = cache.layers[0][0].shape[2:].numel() * cache.memory.element_size()  # bytes of one token's keys
    together = inputs.decodes if inputs.decodes > 1 and _longest(inputs) * piece <= GATHER_BYTES else 0
    padded = _padded(inputs, together, cache.block_size) if together else None
    alone = [_Span(inputs, index, cache.block_size) for index in range(together, len(inputs.chunks))]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.flatten(0, 1) for x in cache.layers[layer])  # (blocks * block_size, kv_heads, head_dim)
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)
        grouped = q.shape[1] != k.shape[1]
        out = []
        if padded is not None:
            places, seen = padded
            many, at, of = q[:together].unsqueeze(2), keys[places].transpose(1, 2), values[places].transpose(1, 2)
            # (S, heads, 1, head_dim), (S, kv_heads, longest, head_dim) twice
            got = F.scaled_dot_product_attention(many, at, of, attn_mask=seen, enable_gqa=grouped)
            out.append(got.squeeze(2))
        for span in alone:
            one, at, of = (
                x.transpose(0, 1).unsqueeze(0)  # (1, heads, tokens, head_dim)
                for x in (q[span.first : span.last], keys[span.places], values[span.places])
            )
            got = F.scaled_dot_product_attention(
                one, at, of, attn_mask=span.seen, is_causal=span.causal, enable_gqa=grouped
            )
            out.append(got.squeeze(0).transpose(0, 1))
        return out[0] if len(out) == 1 else torch.cat(out)

    return attend


def _longest(inputs: StepInputs) -> int:
    return int(inputs.arrays["context_lens"][: inputs.decodes].max())


def _padded(inputs: StepInputs, count: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Places in the cache (S, longest) of every token of the first ``count`` sequences, and which of them exist."""
    longest = _longest(inputs)
    table = torch.from_numpy(inputs.arrays["block_table"][:count]).long()
    token = torch.arange(longest)
    places = table[:, token // block_size] * block_size + token % block_size
    seen = token < torch.from_numpy(inputs.arrays["context_lens"][:count]).unsqueeze(1)
    return places, seen[:, None, None]


class _Span:
    """One sequence of the step: its queries, where its keys are, and which of them each query sees."""

    def __init__(self, inputs: StepInputs, index: int, block_size: int):
        chunk = inputs.chunks[index]
        self.first, self.last = inputs.arrays["query_start"][index : index + 2].tolist()
        context = chunk.start + chunk.count
        self.causal = chunk.start == 0 and chunk.count > 1
        self.seen = None
        if chunk.start and chunk.count > 1:
            self.seen = torch.ones(chunk.count, context, dtype=torch.bool).tril(chunk.start)
        blocks = chunk.sequence.blocks[: -(-context // block_size)]
        self.places: slice | Tensor
        if blocks[-1] - blocks[0] == len(blocks) - 1 and blocks == list(range(blocks[0], blocks[-1] + 1)):
            self.places = slice(blocks[0] * block_size, blocks[0] * block_size + context)
        else:
            token = torch.arange(context)
            self.places = torch.tensor(blocks)[token // block_size] * block_size + token % block_size
