"""Plain generation with a dense key-value cache: for evaluation and parity. Serving has an engine of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.batch import PackedBatch
from llava_fast.config import TextConfig
from llava_fast.model.decoder import turned
from llava_kernels import varlen_attention

if TYPE_CHECKING:
    from llava_fast.model.llava import Llava


class KVCache:
    """Keys and values of S sequences, one dense row each, up to ``capacity`` tokens."""

    def __init__(
        self, text: TextConfig, seqlens: tuple[int, ...], capacity: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (text.num_hidden_layers, len(seqlens), capacity, text.num_key_value_heads, text.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.tensor(seqlens, device=device)  # (S,)

    def attend_prompt(self, implementation: str, batch: PackedBatch):
        """Attention over the packed prompts, which keeps their keys and values."""
        sequence = torch.repeat_interleave(self.lengths, output_size=batch.num_tokens)  # (T,)
        position = batch.position_ids.long()

        def attend(layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = turned(qkv, cos, sin, self.keys.shape[3])
            self.keys[layer, sequence, position] = k
            self.values[layer, sequence, position] = v
            return varlen_attention(
                q, k, v, batch.seqlens, causal=True, implementation=implementation, cu_seqlens=batch.cu_seqlens
            )

        return attend

    def attend_next(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of one new token a sequence, at position ``lengths``, over what is kept."""
        q, k, v = turned(qkv, cos, sin, self.keys.shape[3])  # (S, heads, head_dim)
        sequence = torch.arange(q.shape[0], device=q.device)
        self.keys[layer, sequence, self.lengths] = k
        self.values[layer, sequence, self.lengths] = v
        seen = torch.arange(self.keys.shape[2], device=q.device) <= self.lengths.unsqueeze(1)  # (S, capacity)
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2),  # (S, heads, 1, head_dim)
            self.keys[layer].transpose(1, 2),  # (S, kv_heads, capacity, head_dim)
            self.values[layer].transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.squeeze(2)


@torch.inference_mode()
def generate(
    model: Llava,
    batch: PackedBatch,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop_ids: tuple[int, ...] | None,
) -> list[list[int]]:
    """Continue every sequence of ``batch``.

    Args:
        batch: S packed prompts, on the model's device.
        max_new_tokens: at most this many tokens each, at least 1.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: sample from the smallest set of tokens whose probability reaches this.
        top_k: sample from this many likeliest tokens; 0 for all.
        seed: of the sampling.
        stop_ids: tokens that end a sequence, not part of what is returned; default the config's end of text.

    Returns:
        S lists of new token ids.
    """
    stops = torch.tensor((model.config.text.eos_token_id,) if stop_ids is None else stop_ids, device=model.device)
    cache = KVCache(model.config.text, batch.seqlens, batch.max_seqlen + max_new_tokens, model.device, model.dtype)
    generator = torch.Generator(model.device).manual_seed(seed)
    last_rows = batch.cu_seqlens[1:].long() - 1
    hidden = model.hidden(batch, cache.attend_prompt(model.attention, batch))[last_rows]  # (S, D)
    tokens: list[Tensor] = []
    done = torch.zeros(len(batch.seqlens), dtype=torch.bool, device=model.device)
    while True:
        token = choose(model.head(hidden).float(), temperature, top_p, top_k, generator)  # (S,)
        done |= torch.isin(token, stops)
        tokens.append(torch.where(done, -1, token))
        if len(tokens) == max_new_tokens or bool(done.all()):
            break
        embedded = F.embedding(token, model.decoder.embed_tokens)
        hidden = model.decoder(embedded, cache.lengths, cache.attend_next)
        cache.lengths += 1
    return [[t for t in row if t >= 0] for row in torch.stack(tokens, dim=1).tolist()]


def choose(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token a row. logits: (S, V) float32 -> (S,) int64."""
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already reaches top_p
        probs = probs.scatter(-1, index, ordered.masked_fill(beyond, 0.0))
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)
