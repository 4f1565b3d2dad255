"""Weight-only quantization for inference: the decoder's large products with weights of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_fast.errors import ConfigError
from llava_kernels import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    linear_fp8,
    linear_int4,
    linear_int8,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)

if TYPE_CHECKING:
    from llava_fast.model.llava import Llava

KINDS = ("int8", "int4", "fp8")
GROUP = 128  # input features of an int4 weight that share a scale and an offset
# Rounding takes about ten float32 copies of what it rounds: on a CPU few enough to stay in its cache.
VALUES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 22}

Packed = Int8Weight | Int4Weight | Fp8Weight
_QUANTIZE: dict[str, Callable[[Tensor], Packed]] = {
    "int8": quantize_int8,
    "int4": partial(quantize_int4, group_size=GROUP),
    "fp8": quantize_fp8,
}
_DEQUANTIZE: dict[str, Callable[[Any], Tensor]] = {
    "int8": dequantize_int8,
    "int4": dequantize_int4,
    "fp8": dequantize_fp8,
}
_LINEAR: dict[str, Callable[[Tensor, Any], Tensor]] = {"int8": linear_int8, "int4": linear_int4, "fp8": linear_fp8}


class QuantizedLinear(nn.Module):
    """``x @ W.T`` with W in 8 or 4 bits, where an ``nn.Linear`` without bias stood; for inference.

    Its buffers are the tensors of llava_kernels' ``Int8Weight``, ``Int4Weight`` or ``Fp8Weight``, by their names. They
    move with ``.to(device)`` and stand in ``state_dict``; ``.to(dtype)`` and ``.half()`` leave them as they are.

    Args:
        kind: one of :data:`KINDS`.
        in_features: K.
        out_features: N.
        device: where the buffers are made; their memory is as it comes until :meth:`quantize_rows` has filled it.

    Raises:
        ConfigError: unknown kind.
    """

    def __init__(self, kind: str, in_features: int, out_features: int, device: torch.device | str):
        super().__init__()
        check_kind(kind)
        self.kind, self.in_features, self.out_features = kind, in_features, out_features
        self._empty: Any = _without_content(kind, in_features, out_features)
        for name, tensor in _tensors(self._empty).items():
            self.register_buffer(name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))

    @property
    def packed(self) -> Packed:
        """The buffers as the kernels take them."""
        return replace(self._empty, **self._buffers)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) float32, float16 or bfloat16 -> (..., N) in its dtype.

        Raises:
            ConfigError: x requires a gradient: there is no backward pass.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                f"a model quantized to {self.kind} is for inference and cannot be trained; load it with "
                f"quantization=None to train it, or call it under torch.no_grad()"
            )
        return _LINEAR[self.kind](x, self.packed)

    @torch.no_grad()
    def quantize_rows(self, rows: slice, weight: Tensor) -> None:
        """Round ``weight`` (n, K), of any float dtype and device, into the output features ``rows``.

        A row is rounded by itself, so parts of a merged weight give the same codes as the whole.
        """
        target = by_row(self.packed)
        device = target["scale"].device
        step = max(1, VALUES_AT_ONCE["cpu" if device.type == "cpu" else "cuda"] // self.in_features)
        for start in range(0, len(weight), step):
            some = weight[start : start + step].to(device)
            at = slice(rows.start + start, rows.start + start + len(some))
            for name, rounded in by_row(_QUANTIZE[self.kind](some)).items():
                target[name][at].copy_(rounded)

    def dequantize(self) -> Tensor:
        """(N, K) float32, made anew by each call."""
        return _DEQUANTIZE[self.kind](self.packed)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kind={self.kind!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What .to() and .half() come down to: a change of device is taken, a change of dtype would spoil the codes."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


@lru_cache  # a network has few shapes, and for int4 this is 60 small steps
def _without_content(kind: str, in_features: int, out_features: int) -> Packed:
    """What a weight of this size is, on the meta device: the kernels' own rounding of one row tells it."""
    one = _QUANTIZE[kind](torch.zeros(1, in_features))
    tensors: dict[str, Any] = {}
    for name, tensor in _tensors(one).items():
        size = list(tensor.shape)
        size[_dimension_of_rows(one, name)] = out_features
        tensors[name] = torch.empty(size, dtype=tensor.dtype, device="meta")
    return replace(one, **tensors)


def _dimension_of_rows(weight: Packed, name: str) -> int:
    """int4's scales and offsets are (groups, N)."""
    return 1 if isinstance(weight, Int4Weight) and name in ("scale", "offset") else 0


def by_row(weight: Packed) -> dict[str, Tensor]:
    """Views of a quantized weight's tensors in which row n belongs to output feature n."""
    return {name: t.movedim(_dimension_of_rows(weight, name), 0) for name, t in _tensors(weight).items()}


def _tensors(weight: Packed) -> dict[str, Tensor]:
    return {name: value for name, value in vars(weight).items() if isinstance(value, Tensor)}


def quantize(model: Llava, kind: str) -> None:
    """Round the decoder's weights to ``kind``, in place and one after another; the model is for inference then.

    Vision tower, projector, embeddings and norms stay as they are, and so does a head that is the embedding table.
    int4 leaves every head as it is: its error would go straight into the logits, and it is read once a token where the
    layers' weights are 50 times as large. No parameter requires a gradient afterwards; one that is made to again ends
    in a ConfigError when the model is called.

    Args:
        model: on any device, not quantized.
        kind: "int8", one scale an output feature; "int4", one scale and one offset a group of 128; "fp8", float8_e4m3fn
            with one scale an output feature.

    Raises:
        ConfigError: unknown kind, or the model is quantized already.
    """
    check_kind(kind)
    if (present := quantization_of(model)) is not None:
        raise ConfigError(f"the model is quantized to {present} already; load it with quantization={kind!r} instead")
    for name in quantized_layers(model, kind):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        put_empty(model, kind, name).quantize_rows(slice(0, len(weight)), weight)
    model.requires_grad_(False)


def put_empty(model: Llava, kind: str, name: str) -> QuantizedLinear:
    """Put a :class:`QuantizedLinear` without content where the layer called ``name`` is, on its device."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    layer = QuantizedLinear(kind, linear.in_features, linear.out_features, linear.weight.device)
    model.set_submodule(name, layer)
    return layer


def quantized_layers(model: Llava, kind: str) -> list[str]:
    """The layers that ``kind`` rounds, such as "decoder.layers.0.qkv", in the order of the network."""
    names = [
        f"decoder.layers.{i}.{name}"
        for i in range(len(model.decoder.layers))
        for name in ("qkv", "out", "gate_up", "down")
    ]
    return names if model.lm_head is None or kind == "int4" else [*names, "lm_head"]


def quantization_of(model: nn.Module) -> str | None:
    """The kind that the model's layers are quantized to, None where none is."""
    return next((m.kind for m in model.modules() if isinstance(m, QuantizedLinear)), None)


def check_kind(kind: str) -> None:
    """Raise a ConfigError unless ``kind`` is one of :data:`KINDS`."""
    if kind not in KINDS:
        raise ConfigError(f"quantization={kind!r} is not known; choose one of {', '.join(KINDS)}, or None")
