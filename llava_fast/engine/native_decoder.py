"""The decoder on a CPU through the C library: all layers of a step in one call."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from llava_fast.engine.config import EngineConfig
from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.kv_cache import KVCache
from llava_fast.engine.memory import free_bytes
from llava_fast.engine.screen import Screen
from llava_fast.model import Llava
from llava_fast.model.linear import Linear
from llava_fast.model.quantized import QuantizedLinear
from llava_kernels import Int4Weight, Int8Weight, dispatch, library

log = logging.getLogger(__name__)
PRODUCTS = ("qkv", "out", "gate_up", "down")  # of a layer, by the names of both DecoderLayer and lk_layer


class NativeDecoder:
    """Args:
    model: its weights are used where they are.
    cache: float32 or bfloat16, on a CPU.
    max_length: positions that occur.
    config: its ``activation_bits`` and ``compact_weights``.
    """

    def __init__(self, model: Llava, cache: KVCache, max_length: int, config: EngineConfig):
        decoder, text = model.decoder, model.config.text
        cos, sin = (table.contiguous() for table in decoder.angles(torch.arange(max_length)))
        pairs: list[Tensor] = []  # which the weights of 4 bits get for this decoder
        head, embedding = model.lm_head, decoder.embed_tokens
        self.handle = library.Handle()
        self.instructions, self.threads = self.handle.instructions, self.handle.threads
        screen = self._screen(embedding if head is None else head.weight if isinstance(head, Linear) else None)
        described = [_layer(*of, pairs) for of in zip(decoder.layers, cache.layers, strict=True)]
        layers = (library.Layer * len(described))(*described)
        last = library.float_weight(embedding) if head is None else _weight(head, pairs)
        self.compact = _compact(self.handle, [*_products(layers), last], config.compact_weights)
        keys = cache.layers[0][0]  # (blocks, block_size, kv_heads, head_dim)
        args = library.DecoderArgs(
            dtype=library.DTYPES[model.dtype],
            cache_dtype=library.DTYPES[keys.dtype],
            layers=len(layers),
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            eps=text.rms_norm_eps,
            layer=layers,
            norm=decoder.norm.weight.data_ptr(),
            head=last,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            positions=max_length,
            blocks=keys.shape[0],
            block_size=keys.shape[1],
            cache_block_stride=keys.stride(0),
            cache_token_stride=keys.stride(1),
            cache_head_stride=keys.stride(2),
            activation_bits=config.activation_bits or (8 if model.dtype == torch.bfloat16 else 16),
        )
        if screen is not None:
            args.screen, args.screen_error = library.int8_weight(screen.weight), screen.error.data_ptr()
        self.vocab_size = text.vocab_size
        self._decoder = library.Decoder(
            self.handle, args, keep=(model, cache, cos, sin, layers, pairs, screen, self.compact)
        )

    def _screen(self, head: Tensor | None) -> Screen | None:
        """For heads of bfloat16."""
        return Screen.of(head) if head is not None and head.dtype == torch.bfloat16 else None

    @staticmethod
    def misfit(model: Llava) -> str | None:
        """Why the library does not decode for this model, None where it does: float32 and bfloat16, int8 and int4."""
        text = model.config.text
        if dispatch.chosen() not in ("auto", "native"):
            return f"{dispatch.chosen()!r} was asked for"
        if library.load() is None:
            return "the C library is not to be had"
        if model.dtype not in library.DTYPES:
            return f"the C library has no {str(model.dtype).removeprefix('torch.')}"
        products = [getattr(layer, name) for layer in model.decoder.layers for name in PRODUCTS] + [model.lm_head]
        if not all(type(m) in (Linear, QuantizedLinear, type(None)) for m in products):
            return "the C library adds no adapters"
        if not all(m.kind in ("int8", "int4") for m in products if isinstance(m, QuantizedLinear)):
            return "the C library has no fp8"
        if text.head_dim % 2 or text.head_dim > 256 or text.num_attention_heads > 32 * text.num_key_value_heads:
            return f"the C library has no heads of {text.head_dim}, {text.num_attention_heads} of them"
        return None

    def __call__(self, x: Tensor, inputs: StepInputs, rows: Tensor | None = None) -> Tensor:
        """x: (T, D) embeddings -> (T, D) float32 before the final norm; (n, D) of ``rows`` (n,) int64, ascending."""
        x, arrays = x.contiguous(), inputs.arrays
        outputs = x.shape[0] if rows is None else len(rows)
        hidden = torch.empty(max(outputs, 1), x.shape[1])  # nothing has no address
        wanted = rows if outputs else torch.zeros(1, dtype=torch.int64)
        table = arrays["block_table"]
        args = library.StepArgs(
            dtype=library.DTYPES[x.dtype],
            tokens=x.shape[0],
            sequences=len(inputs.chunks),
            x=x.data_ptr(),
            positions=arrays["position_ids"].ctypes.data,
            slots=arrays["slots"].ctypes.data,
            block_table=table.ctypes.data,
            table_stride=table.strides[0] // table.itemsize,
            context_lens=arrays["context_lens"].ctypes.data,
            query_start=arrays["query_start"].ctypes.data,
            hidden=hidden.data_ptr(),
            rows=None if wanted is None else wanted.data_ptr(),
            outputs=outputs,
        )
        self._decoder.step(args)
        return hidden[:outputs]

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: (n, D) float32 -> logits (n, V) float32."""
        hidden = hidden.contiguous()
        logits = torch.empty(hidden.shape[0], self.vocab_size)
        self._decoder.head(hidden.shape[0], hidden.data_ptr(), logits.data_ptr())
        return logits

    def next(self, args: library.NextArgs) -> None:
        """One token more of sequences that decode."""
        self._decoder.next(args)


def _layer(layer: Any, cache: tuple[Tensor, Tensor], pairs: list[Tensor]) -> library.Layer:
    """layer: a DecoderLayer; cache: its keys and values; pairs: gets what is made for its weights and must be kept."""
    described = library.Layer(
        attention_norm=layer.attention_norm.weight.data_ptr(),
        mlp_norm=layer.mlp_norm.weight.data_ptr(),
        k_cache=cache[0].data_ptr(),
        v_cache=cache[1].data_ptr(),
    )
    for name in PRODUCTS:
        setattr(described, name, _weight(getattr(layer, name), pairs))
    return described


def _products(layers: Any) -> list[library.Weight]:
    """layers: an array of library.Layer -> what its fields are, not copies."""
    return [getattr(layer, name) for layer in layers for name in PRODUCTS]


def _compact(handle: library.Handle, weights: list[library.Weight], wanted: bool | None) -> list[library.Compact]:
    """Compact forms of a bfloat16 model's weights, which are told of them; none where they are not wanted.

    wanted: as EngineConfig.compact_weights.
    """
    if wanted is False or any(weight.format != library.BFLOAT16 for weight in weights):
        return []
    needed = sum(weight.out_features * weight.in_features for weight in weights) * 3 // 2
    if wanted is None and 4 * needed > free_bytes(torch.device("cpu")):
        return []
    made = []
    for weight in weights:
        try:
            made.append(library.Compact(handle, weight))
        except library.LibraryError as error:
            log.info("a weight stays as it is: %s", error)
        else:
            weight.compact = made[-1].address
    return made


def _weight(linear: torch.nn.Module, pairs: list[Tensor]) -> library.Weight:
    if isinstance(linear, QuantizedLinear):
        packed = linear.packed
        if isinstance(packed, Int8Weight):
            return library.int8_weight(packed)
        assert isinstance(packed, Int4Weight)
        pairs.append(library.group_pairs(packed))
        return library.int4_weight(packed, pairs[-1])
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return library.float_weight(weight)
