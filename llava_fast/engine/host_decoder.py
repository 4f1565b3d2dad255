"""The decoder on a CPU: the network of ``model.decoder`` written flat, so that little of a step is Python.

It is what CUDA graphs are on a GPU: calling modules one by one costs a small model several times its products. Keys are
turned in place inside the QKV product, so that keys and values go into the cache by one copy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.kv_cache import KVCache
from llava_fast.model.decoder import Decoder
from llava_fast.model.linear import Linear
from llava_kernels import linear

GATHER_BYTES = 1 << 19  # keys and values of one sequence and layer that are copied sooner than torch is called again


class HostDecoder:
    """Args:
    decoder: its weights are used where they are.
    cache: of the model's dtype or float32, on a CPU.
    max_length: positions that occur.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, max_length: int):
        text = decoder.config
        self.heads, self.kv_heads, self.head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        self.eps, self.block_size = text.rms_norm_eps, cache.block_size
        self.layers = [
            (
                layer.attention_norm.weight,
                layer.qkv.weight,
                layer.out.weight,
                layer.mlp_norm.weight,
                layer.gate_up.weight,
                layer.down.weight,
            )
            for layer in decoder.layers
        ]
        self.blocks = list(cache.memory)  # (blocks, block_size, 2, kv_heads, head_dim) a layer
        self.rows = [blocks.view(-1, 2 * self.kv_heads, self.head_dim) for blocks in self.blocks]  # a token a row
        cos, sin = decoder.angles(torch.arange(max_length))
        # x turned by its angle is x * cos + (its halves exchanged) * sin, with the first half of sin negative.
        self.cos = torch.cat((cos, cos), dim=1).unsqueeze(1)  # (max_length, 1, head_dim) float32
        self.sin = torch.cat((-sin, sin), dim=1).unsqueeze(1)

    @staticmethod
    def fits(decoder: Decoder) -> bool:
        """Whether all products are plain ones; those of quantized weights go through their modules."""
        return all(
            type(p) is Linear for layer in decoder.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )

    def __call__(self, x: Tensor, inputs: StepInputs) -> Tensor:
        """x: (T, D) embeddings -> (T, D) before the final norm."""
        step = _Step(self, inputs)
        positions = torch.from_numpy(inputs.arrays["position_ids"])
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)  # (T, 1, head_dim)
        slots = torch.from_numpy(inputs.arrays["slots"])
        turned, half = self.heads + self.kv_heads, self.head_dim // 2
        for index, (norm, qkv, out, mlp_norm, gate_up, down) in enumerate(self.layers):
            rows = self.rows[index]
            heads = linear(self.norm(x, norm), qkv).view(x.shape[0], -1, self.head_dim).to(rows.dtype)
            qk = heads[:, :turned]
            exchanged = qk.roll(half, -1)
            qk.mul_(cos).addcmul_(exchanged, sin)
            rows.index_copy_(0, slots, heads[:, self.heads :])
            x = x + linear(step.attend(index, heads[:, : self.heads]).to(x.dtype), out)
            gate, up = linear(self.norm(x, mlp_norm), gate_up).chunk(2, dim=-1)
            x = x + linear(F.silu(gate).mul_(up), down)
        return x

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        return (y * y.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()).to(x.dtype).mul_(weight)


class _Step:
    """Attention of one step: what can be worked out once for all layers, is."""

    def __init__(self, decoder: HostDecoder, inputs: StepInputs):
        self.decoder, self.scale = decoder, 1 / math.sqrt(decoder.head_dim)
        self.grouped = decoder.heads != decoder.kv_heads
        piece = decoder.rows[0][0].numel() * decoder.rows[0].element_size()  # bytes of one token
        contexts = inputs.arrays["context_lens"]
        # Many short sequences share one padded call; a long one is read where it lies.
        self.together = inputs.decodes if inputs.decodes > 1 and inputs.max_context * piece <= GATHER_BYTES else 0
        if self.together:
            table = inputs.arrays["block_table"][: self.together]
            self.table = torch.from_numpy(table).flatten()
            tokens = torch.arange(table.shape[1] * decoder.block_size)
            self.seen = (tokens < torch.from_numpy(contexts[: self.together]).unsqueeze(1))[:, None, None]
        self.alone = [_Span(inputs, i, decoder.block_size) for i in range(self.together, len(inputs.chunks))]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: (T, heads, head_dim) -> (T, heads * head_dim)."""
        parts = [self._attend_together(layer, q)] if self.together else []
        for span in self.alone:
            kv = span.read(self.decoder, layer)  # (context, 2 kv_heads, head_dim)
            k, v = kv.transpose(0, 1).unsqueeze(0).split(self.decoder.kv_heads, dim=1)
            mine = q[span.first : span.last].transpose(0, 1).unsqueeze(0)  # (1, heads, tokens, head_dim)
            got = F.scaled_dot_product_attention(
                mine, k, v, attn_mask=span.seen, is_causal=span.causal, enable_gqa=self.grouped
            )
            parts.append(got[0].transpose(0, 1).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_together(self, layer: int, q: Tensor) -> Tensor:
        kv = self.decoder.blocks[layer].index_select(0, self.table)
        kv = kv.view(self.together, -1, *self.decoder.rows[layer].shape[1:])  # (S, padded, 2 kv_heads, head_dim)
        k, v = kv.transpose(1, 2).split(self.decoder.kv_heads, dim=1)
        got = F.scaled_dot_product_attention(
            q[: self.together].unsqueeze(2), k, v, attn_mask=self.seen, enable_gqa=self.grouped
        )
        return got.flatten(1)


class _Span:
    """One sequence of the step: its queries, where its keys are, and which of them each query sees."""

    def __init__(self, inputs: StepInputs, index: int, block_size: int):
        chunk = inputs.chunks[index]
        self.first, self.last = inputs.arrays["query_start"][index : index + 2].tolist()
        self.context = chunk.start + chunk.count
        self.causal = chunk.start == 0 and chunk.count > 1
        self.seen = None
        if chunk.start and chunk.count > 1:
            self.seen = torch.ones(chunk.count, self.context, dtype=torch.bool).tril(chunk.start)
        blocks = chunk.sequence.blocks[: -(-self.context // block_size)]
        self.start = blocks[0] * block_size
        self.scattered = None
        if blocks[-1] - blocks[0] != len(blocks) - 1 or blocks != list(range(blocks[0], blocks[-1] + 1)):
            self.scattered = torch.tensor(blocks)

    def read(self, decoder: HostDecoder, layer: int) -> Tensor:
        """Its keys and values (context, 2 kv_heads, head_dim); no copy where its blocks lie in one piece."""
        if self.scattered is None:
            return decoder.rows[layer][self.start : self.start + self.context]
        gathered = decoder.blocks[layer].index_select(0, self.scattered)
        return gathered.view(-1, *decoder.rows[layer].shape[1:])[: self.context]
