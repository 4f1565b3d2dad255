"""The decoder on a CPU: the network of ``model.decoder`` written flat, so that little of a step is Python.

It is what CUDA graphs are on a GPU: calling modules one by one costs a small model several times its products. The one
function :func:`decode` is compiled by TorchScript where that is to be had and runs as plain Python where it is not.
Keys are turned in place inside the QKV product, so that keys and values go into the cache by one copy.
"""

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.kv_cache import KVCache
from llava_fast.model import Llava
from llava_fast.model.decoder import DecoderLayer
from llava_fast.model.linear import Linear
from llava_kernels.linear import FEW_ROWS, linear_in_float32, multiplies_in_software

GATHER_BYTES = 16 << 20  # keys and values of one layer up to which copying them all beats a call for each sequence

log = logging.getLogger(__name__)


class Layer(NamedTuple):
    """Weights of one layer."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Span(NamedTuple):
    """One sequence of a step: its queries first..last-1, its keys, and which of them each query sees.

    Its ``context`` tokens begin at row ``start`` of the cache, or lie in the blocks ``scattered``.
    """

    first: int
    last: int
    start: int
    context: int
    causal: bool
    scattered: Tensor | None
    seen: Tensor | None  # (last - first, context) bool


class HostDecoder:
    """Args:
    model: its weights are used where they are.
    cache: of the model's dtype or float32, on a CPU.
    max_length: positions that occur.
    """

    def __init__(self, model: Llava, cache: KVCache, max_length: int):
        decoder, text = model.decoder, model.config.text
        self.heads, self.kv_heads, self.eps = text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps
        self.block_size = cache.block_size
        self.layers = [Layer(*_weights(layer)) for layer in decoder.layers]  # type: ignore[arg-type]
        self.blocks = list(cache.memory.flatten(3, 4))  # (blocks, block_size, 2 kv_heads, head_dim) a layer
        self.norm_and_head = (decoder.norm.weight.detach(), model.head_weight.detach())
        self.software = multiplies_in_software(decoder.embed_tokens)
        cos, sin = decoder.angles(torch.arange(max_length))
        # x turned by its angle is x * cos + (its halves exchanged) * sin, with the first half of sin negative.
        self.cos = torch.cat((cos, cos), dim=1).unsqueeze(1)  # (max_length, 1, head_dim) float32
        self.sin = torch.cat((-sin, sin), dim=1).unsqueeze(1)

    @staticmethod
    def fits(model: Llava) -> bool:
        """Whether all products are plain ones; those of quantized weights go through their modules."""
        names = ("qkv", "out", "gate_up", "down")
        products = [getattr(layer, name) for layer in model.decoder.layers for name in names]
        return all(type(product) is Linear for product in products) and type(model.lm_head) in (Linear, type(None))

    def __call__(self, x: Tensor, inputs: StepInputs, rows: Tensor | None = None) -> Tensor:
        """x: (T, D) embeddings -> (T, D) before the final norm, or (n, D) of ``rows`` (n,)."""
        positions = torch.from_numpy(inputs.arrays["position_ids"])
        slots = torch.from_numpy(inputs.arrays["slots"])
        piece = self.blocks[0][0, 0].numel() * self.blocks[0].element_size()  # bytes of one token
        # Many short sequences share one padded call; long ones are read where they lie.
        size = inputs.decodes * inputs.max_context * piece
        together = inputs.decodes if inputs.decodes > 1 and size <= GATHER_BYTES else 0
        table, bias = _padded(inputs, together, self.block_size) if together else (slots, self.sin)
        spans = [_span(inputs, i, self.block_size) for i in range(together, len(inputs.chunks))]
        hidden = compiled()[0](
            x, self.layers, self.blocks, self.cos, self.sin, positions, slots, spans, together, table, bias,
            self.heads, self.kv_heads, self.eps, self.software and x.shape[0] > FEW_ROWS,
        )  # fmt: skip
        return hidden if rows is None else hidden[rows]

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: (n, D) -> logits (n, V)."""
        in_float32 = self.software and hidden.shape[0] > FEW_ROWS
        return compiled()[1](hidden, *self.norm_and_head, self.eps, in_float32)


def decode(
    x: Tensor,
    layers: list[Layer],
    blocks: list[Tensor],
    all_cos: Tensor,
    all_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    spans: list[Span],
    together: int,
    table: Tensor,
    bias: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    in_float32: bool,
) -> Tensor:
    """One pass over the layers. The first ``together`` tokens decode by one padded call over ``table``, the rest is
    ``spans``."""
    cos, sin = all_cos.index_select(0, positions), all_sin.index_select(0, positions)  # (T, 1, head_dim)
    head_dim = cos.size(2)
    for index, layer in enumerate(layers):
        cached = blocks[index]
        rows = cached.view(-1, 2 * kv_heads, head_dim)  # a token a row
        projected = multiply(normalize(x, layer.attention_norm, eps), layer.qkv, in_float32)
        qkv = projected.view(x.size(0), -1, head_dim).to(rows.dtype)
        qk = qkv[:, : heads + kv_heads]
        exchanged = qk.roll(head_dim // 2, -1)
        qk.mul_(cos).addcmul_(exchanged, sin)
        rows.index_copy_(0, slots, qkv[:, heads:])
        parts: list[Tensor] = []
        if together > 0:
            kv = cached.index_select(0, table).view(together, -1, 2 * kv_heads, head_dim).transpose(1, 2)
            q = qkv[:together, :heads].unsqueeze(2)  # (S, heads, 1, head_dim)
            k, v = kv[:, :kv_heads], kv[:, kv_heads:]  # (S, kv_heads, padded, head_dim)
            parts.append(F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=heads != kv_heads).flatten(1))
        for span in spans:
            places = span.scattered
            if places is None:
                kv = rows[span.start : span.start + span.context]
            else:
                kv = cached.index_select(0, places).view(-1, 2 * kv_heads, head_dim)[: span.context]
            kv = kv.transpose(0, 1).unsqueeze(0)
            q = qkv[span.first : span.last, :heads].transpose(0, 1).unsqueeze(0)  # (1, heads, tokens, head_dim)
            k, v = kv[:, :kv_heads], kv[:, kv_heads:]
            got = F.scaled_dot_product_attention(q, k, v, span.seen, 0.0, span.causal, enable_gqa=heads != kv_heads)
            parts.append(got.squeeze(0).transpose(0, 1).flatten(1))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        x = x + multiply(attended.to(x.dtype), layer.out, in_float32)
        gate, up = multiply(normalize(x, layer.mlp_norm, eps), layer.gate_up, in_float32).chunk(2, dim=-1)
        x = x + multiply(F.silu(gate).mul_(up), layer.down, in_float32)
    return x


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).to(x.dtype).mul_(weight)


def multiply(x: Tensor, weight: Tensor, in_float32: bool) -> Tensor:
    return linear_in_float32(x, weight) if in_float32 else F.linear(x, weight)


def normalize_and_multiply(x: Tensor, norm: Tensor, weight: Tensor, eps: float, in_float32: bool) -> Tensor:
    return multiply(normalize(x, norm, eps), weight, in_float32)


@cache
def compiled() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """:func:`decode` and :func:`normalize_and_multiply`, without the Python between their operations if this torch
    still has TorchScript."""
    try:
        with warnings.catch_warnings():  # torch announces that TorchScript will go; then the plain function stays
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(decode), torch.jit.script(normalize_and_multiply)
    except Exception as error:
        log.info("decoding on the CPU without TorchScript: %s", error)
        return decode, normalize_and_multiply


def _weights(layer: DecoderLayer) -> tuple[Tensor, ...]:
    modules = (layer.attention_norm, layer.qkv, layer.out, layer.mlp_norm, layer.gate_up, layer.down)
    return tuple(module.weight.detach() for module in modules)  # type: ignore[union-attr]


def _padded(inputs: StepInputs, count: int, block_size: int) -> tuple[Tensor, Tensor]:
    """The blocks of the first ``count`` sequences, flat, and (S, 1, 1, padded): 0 for their tokens, else -inf."""
    table = inputs.arrays["block_table"][:count]
    tokens = torch.arange(table.shape[1] * block_size)
    seen = tokens < torch.from_numpy(inputs.arrays["context_lens"][:count]).unsqueeze(1)
    bias = torch.zeros(seen.shape).masked_fill_(seen.logical_not(), float("-inf"))
    return torch.from_numpy(table).flatten(), bias[:, None, None]


def _span(inputs: StepInputs, index: int, block_size: int) -> Span:
    chunk = inputs.chunks[index]
    first, last = inputs.arrays["query_start"][index : index + 2].tolist()
    context = chunk.start + chunk.count
    seen = None
    if chunk.start and chunk.count > 1:
        seen = torch.ones(chunk.count, context, dtype=torch.bool).tril(chunk.start)
    blocks = chunk.sequence.blocks[: -(-context // block_size)]
    scattered = None
    if blocks[-1] - blocks[0] != len(blocks) - 1 or blocks != list(range(blocks[0], blocks[-1] + 1)):
        scattered = torch.tensor(blocks)
    causal = chunk.start == 0 and chunk.count > 1
    return Span(first, last, blocks[0] * block_size, context, causal, scattered, seen)
