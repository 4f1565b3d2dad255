"""Quantized weights in a directory: what config.json says of them, and the tensors that stand for each of them.

int8 and fp8 are written as compressed-tensors writes them (weight-only, one scale an output feature), so software that
reads those and takes a quantized output head reads them too: transformers, where the package compressed-tensors is
installed. Not all take such a head: SGLang, as of August 2026, leaves it unfilled. The head from before quantization,
put back as ``model.lm_head``, is written and read plain. int4 has offsets that are no multiples of the scale, which
that format has no place for: those directories only llava_fast reads.

For a weight of N output and K input features, in the place of its ``weight``:

    int8  weight_packed   (N, ceil(K/4)) int32: codes 1 to 255 in order, the first in the lowest byte
          weight_scale    (N, 1) float32: value = scale * (code - 128)
          weight_shape    (2,) int64: N and K
    fp8   weight          (N, K) float8_e4m3fn
          weight_scale    (N, 1) float32: value = scale * code
    int4  weight_packed   (N, ceil(K/8)) int32: codes 0 to 15 in order, the first in the lowest bits
          weight_scale    (N, ceil(K/128)) bfloat16, and
          weight_offset   (N, ceil(K/128)) bfloat16, of a group of 128 input features
          weight_channel  (N, 1) float32: value = channel * (scale * code + offset)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.checkpoint.files import Made, form_of
from llava_fast.errors import CheckpointError
from llava_fast.model.quantized import GROUP, KINDS, QuantizedLinear, by_row
from llava_kernels.quantized_linear import BLOCK, PLANES

SCALE = "weight_scale"  # every kind has it, so it tells whether a weight is quantized
# Names in a file -> names of the layer's buffers.
_BUFFERS = {
    "int8": {"weight_packed": "words", SCALE: "scale"},
    "int4": {"weight_packed": "words", SCALE: "scale", "weight_offset": "offset", "weight_channel": "channel"},
    "fp8": {"weight": "codes", SCALE: "scale"},
}
_TYPES = {"int8": "int", "fp8": "float"}  # as compressed-tensors calls them
_FORMATS = {"int8": "pack-quantized", "fp8": "float-quantized"}
_INT4 = {"quant_method": "llava_fast", "format": "int4-offset", "group_size": GROUP}


def quantization_fields(kind: str, *, head: bool) -> dict[str, Any]:
    """``quantization_config`` of a config.json; ``head``: whether the output head is quantized too."""
    if kind == "int4":
        return dict(_INT4)
    weights = {"num_bits": 8, "type": _TYPES[kind], "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    plain = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": plain if head else [*plain, "re:.*lm_head.*"],
    }


def stored_kind(fields: dict[str, Any], file: Path) -> str | None:
    """The kind of quantized weights that ``fields`` of ``file`` (a config.json) announce, None for plain weights.

    Raises:
        CheckpointError: quantized in a form that is not read.
    """
    text = fields.get("text_config") or {}
    told = next((c["quantization_config"] for c in (fields, text) if c.get("quantization_config")), None)
    if told is None:
        return None
    for kind in KINDS:
        if _is_said(kind, told):
            return kind
    method, form = (told.get(name) for name in ("quant_method", "format"))
    raise CheckpointError(
        f"{file}: weights quantized with quant_method={method!r}{f', format={form!r}' if form else ''} are not read; "
        f"llava_fast reads what it writes, and compressed-tensors' 8-bit weights with one scale an output feature. "
        f"Take the checkpoint without quantization, and load it with quantization='int8', 'int4' or 'fp8'"
    )


def _is_said(kind: str, told: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` says that weights are of ``kind`` in the form that is read here."""
    if kind == "int4":
        return all(told.get(name) == value for name, value in _INT4.items())
    groups = (told.get("config_groups") or {}).values()
    return (
        told.get("quant_method") == "compressed-tensors"
        and told.get("format") == _FORMATS[kind]
        and len(groups) > 0
        and all(_is_channelwise(group, _TYPES[kind]) for group in groups)
    )


def _is_channelwise(group: dict[str, Any], type_: str) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    needed = {"num_bits": 8, "type": type_, "symmetric": True, "strategy": "channel"}
    return (
        all(weights.get(name) == value for name, value in needed.items())
        and not weights.get("dynamic")
        and not weights.get("actorder")
        # Activations that are to be rounded on the fly leave no trace in the weights; here they are not rounded.
        and (inputs is None or inputs.get("dynamic") is True)
    )


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, and of a model.

    Attributes:
        tensor: as it is written.
        put: takes such a tensor from a file into the model.
    """

    tensor: Tensor | Made
    put: Callable[[Tensor], object]

    @property
    def like(self) -> Tensor:
        """What tells the tensor's shape and dtype."""
        return form_of(self.tensor)


def stored(layer: QuantizedLinear, rows: slice) -> dict[str, Stored]:
    """What stands in a file for the output features ``rows``, by the last part of its name."""
    views = {name: tensor[rows] for name, tensor in by_row(layer.packed).items()}
    found = {}
    for name, buffer in _BUFFERS[layer.kind].items():
        if buffer in ("words", "codes"):
            found[name] = _codes(layer, views[buffer])
        else:
            found[name] = _numbers(views[buffer])
    if layer.kind == "int8":
        shape = torch.tensor([len(views["scale"]), layer.in_features])
        found["weight_shape"] = Stored(shape, lambda tensor: None)  # the config has told it
    return found


def _numbers(view: Tensor) -> Stored:
    """view: (n,) or (n, groups) of the layer; in a file the former is (n, 1)."""
    return Stored(view.reshape(len(view), -1), lambda tensor: view.copy_(tensor.reshape(view.shape)))


def _codes(layer: QuantizedLinear, view: Tensor) -> Stored:
    """view: (n, words) int32 or (n, padded K) float8 of the layer, in the kernels' order."""
    kind, k = layer.kind, layer.in_features
    row = in_order(kind, view.new_zeros(1, view.shape[1], device="cpu"), k)
    form = row.new_empty(len(view), row.shape[1], device="meta")
    made = Made(form, lambda: in_order(kind, view, k))
    return Stored(made, lambda tensor: view.copy_(for_kernels(kind, tensor.to(view.device), k)))


# llava_kernels.quantized_linear says how a weight lies in memory: in blocks of K, in which the values of a word of 32
# bits are ``planes`` pairs of neighbours, the pairs far apart. In a file the values stand in their order.


def in_order(kind: str, laid_out: Tensor, k: int) -> Tensor:
    """A layer's words or codes as they stand in a file; ``k``: how many values a row has without its padding."""
    block, planes = _layout(kind)
    codes = laid_out.view(torch.uint8)
    codes = _halves(codes) if kind == "int4" else codes  # (n, padded K)
    codes = codes.unflatten(1, (-1, block // planes // 2, 2, planes)).permute(0, 1, 4, 2, 3).flatten(1)[:, :k]
    if kind == "fp8":
        return codes.contiguous().view(torch.float8_e4m3fn)
    codes = F.pad(codes, (0, -k % (8 if kind == "int4" else 4)))  # whole words
    return (_bytes(codes) if kind == "int4" else codes.contiguous()).view(torch.int32)


def for_kernels(kind: str, in_file: Tensor, k: int) -> Tensor:
    """The inverse of :func:`in_order`. As in rounding, the last value of a row is repeated to fill the last block."""
    block, planes = _layout(kind)
    codes = in_file.contiguous().view(torch.uint8)
    codes = (_halves(codes) if kind == "int4" else codes)[:, :k]
    codes = torch.cat([codes, codes[:, -1:].expand(-1, -k % block)], dim=1)
    codes = codes.unflatten(1, (-1, planes, block // planes // 2, 2)).permute(0, 1, 3, 4, 2).flatten(1)
    codes = _bytes(codes) if kind == "int4" else codes.contiguous()
    return codes.view(torch.float8_e4m3fn if kind == "fp8" else torch.int32)


def _layout(kind: str) -> tuple[int, int]:
    return GROUP if kind == "int4" else BLOCK, PLANES[kind]


def _halves(pairs: Tensor) -> Tensor:
    """(n, m) bytes -> (n, 2m) values of 4 bits, the low one first."""
    return torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)


def _bytes(halves: Tensor) -> Tensor:
    """The inverse of :func:`_halves`."""
    return halves[:, ::2] | halves[:, 1::2] << 4


def grown(head: QuantizedLinear, rows: int) -> QuantizedLinear:
    """``head`` with ``rows`` output features, each new one the mean of the old."""
    old = by_row(head.packed)
    larger = QuantizedLinear(head.kind, head.in_features, rows, old["scale"].device)
    for name, tensor in by_row(larger.packed).items():
        tensor[: head.out_features].copy_(old[name])
    mean = head.dequantize().mean(0, keepdim=True)  # (1, K)
    larger.quantize_rows(slice(head.out_features, rows), mean.expand(rows - head.out_features, -1))
    return larger
