"""The table of names: which rows of our parameters hold which tensor of a checkpoint.

Canonical names are those of the transformers LLaVA files on the hub. Ours differ in that query, key and value, and
gate and up, are one matrix each. Every part is a run of rows, so a merged matrix is filled and written by views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llava_fast.checkpoint.files import Entry, TensorFiles, shorten
from llava_fast.checkpoint.packed import SCALE, Stored, stored
from llava_fast.config import ModelConfig
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.model import Llava
from llava_fast.model.decoder import projections
from llava_fast.model.quantized import QuantizedLinear, quantization_of, quantized_layers

VISION = "vision_tower.vision_model."
TEXT = "language_model.model."
HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
PROJECTOR = "multi_modal_projector."

Parts = dict[str, list[tuple[str, slice]]]


def canonical_parts(config: ModelConfig) -> Parts:
    """For each of our parameters the canonical tensors that it holds, each with its rows, first to last."""
    return _vision_parts(config) | _projector_parts(config) | _text_parts(config)


def _vision_parts(config: ModelConfig) -> Parts:
    vision = config.vision
    dim, inner = vision.hidden_size, vision.intermediate_size
    ours, theirs = "vision_tower.", VISION
    parts: Parts = {
        f"{ours}class_embedding": [(f"{theirs}embeddings.class_embedding", slice(0, dim))],
        f"{ours}patch_embedding": [(f"{theirs}embeddings.patch_embedding.weight", slice(0, dim))],
        f"{ours}position_embedding": [
            (f"{theirs}embeddings.position_embedding.weight", slice(0, 1 + vision.num_patches))
        ],
    }

    def add(our: str, pieces: list[tuple[str, int]]) -> None:
        for kind in ("weight", "bias"):
            parts[f"{ours}{our}.{kind}"] = _stack([(f"{theirs}{piece}.{kind}", rows) for piece, rows in pieces])

    add("pre_norm", [("pre_layrnorm", dim)])  # transformers' spelling
    add("post_norm", [("post_layernorm", dim)])
    for i in range(vision.num_hidden_layers):
        our, their = f"layers.{i}", f"encoder.layers.{i}"
        add(f"{our}.norm1", [(f"{their}.layer_norm1", dim)])
        add(f"{our}.qkv", [(f"{their}.self_attn.{x}_proj", dim) for x in "qkv"])
        add(f"{our}.out", [(f"{their}.self_attn.out_proj", dim)])
        add(f"{our}.norm2", [(f"{their}.layer_norm2", dim)])
        add(f"{our}.fc1", [(f"{their}.mlp.fc1", inner)])
        add(f"{our}.fc2", [(f"{their}.mlp.fc2", dim)])
    return parts


def _projector_parts(config: ModelConfig) -> Parts:
    layers = ("linear_1", "linear_2") if config.projector == "mlp2x_gelu" else ("linear_1",)
    rows = slice(0, config.text.hidden_size)
    return {
        f"projector.{layer}.{kind}": [(f"{PROJECTOR}{layer}.{kind}", rows)]
        for layer in layers
        for kind in ("weight", "bias")
    }


def _text_parts(config: ModelConfig) -> Parts:
    text = config.text
    dim, vocab = text.hidden_size, text.vocab_size
    parts: Parts = {"decoder.embed_tokens": [(EMBEDDING, slice(0, vocab))]}
    parts["decoder.norm.weight"] = [(f"{TEXT}norm.weight", slice(0, dim))]
    if not text.tie_word_embeddings:
        parts["lm_head.weight"] = [(HEAD, slice(0, vocab))]
    for i in range(text.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}", f"{TEXT}layers.{i}"
        parts[f"{ours}.attention_norm.weight"] = [(f"{theirs}.input_layernorm.weight", slice(0, dim))]
        parts[f"{ours}.mlp_norm.weight"] = [(f"{theirs}.post_attention_layernorm.weight", slice(0, dim))]
        for product, pieces in projections(text).items():
            block = "self_attn" if product in ("qkv", "out") else "mlp"
            parts[f"{ours}.{product}.weight"] = [
                (f"{theirs}.{block}.{piece}.weight", rows) for piece, rows in pieces.items()
            ]
    return parts


def _stack(pieces: list[tuple[str, int]]) -> list[tuple[str, slice]]:
    stacked, start = [], 0
    for name, rows in pieces:
        stacked.append((name, slice(start, start + rows)))
        start += rows
    return stacked


def canonical_tensors(model: Llava, *, only: str = "") -> dict[str, Tensor]:
    """The model's weights under their canonical names, as views: writing to them changes the model.

    Args:
        model: what they are taken from.
        only: those whose canonical names begin so; default all.

    Raises:
        ConfigError: one of them is quantized.
    """
    params = dict(model.named_parameters())
    tensors = {}
    for ours, name, rows in _rows(model, only):
        if ours not in params:
            raise ConfigError(
                f"the decoder is quantized to {quantization_of(model)}, and {ours} has no plain values; quantized "
                f"models are written by llava_fast.save with format='hf' alone"
            )
        tensors[name] = params[ours].detach()[rows]
    return tensors


def stored_tensors(model: Llava, *, only: str = "", packed: bool = True) -> dict[str, Stored]:
    """Every tensor that a checkpoint holds of the model, by canonical name, and where its like goes when it is read.

    Args:
        model: what is written or filled.
        only: the weights whose canonical names begin so; default all.
        packed: quantized layers stand in the checkpoint as :mod:`llava_fast.checkpoint.packed` says; else their
            weights are plain there, and rounded as they arrive.
    """
    params, layers = dict(model.named_parameters()), _quantized(model)
    tensors: dict[str, Stored] = {}
    for ours, name, rows in _rows(model, only):
        if ours in params:
            view = params[ours].detach()[rows]
            tensors[name] = Stored(view, view.copy_)
        elif packed:
            tensors |= named(name, stored(layers[ours], rows))
        else:
            plain = torch.empty(rows.stop - rows.start, layers[ours].in_features, device="meta")
            tensors[name] = Stored(plain, partial(layers[ours].quantize_rows, rows))
    return tensors


def named(name: str, parts: dict[str, Stored]) -> dict[str, Stored]:
    """``parts`` of the quantized weight with the canonical name ``name``, under names that begin as it does."""
    return {name.removesuffix("weight") + part: value for part, value in parts.items()}


def _rows(model: Llava, only: str = "") -> Iterator[tuple[str, str, slice]]:
    """(name of ours, canonical name that begins with ``only``, its rows)."""
    for ours, parts in canonical_parts(model.config).items():
        for name, rows in parts:
            if name.startswith(only):
                yield ours, name, rows


def _quantized(model: Llava) -> dict[str, QuantizedLinear]:
    """The quantized layers by the names that their weights have in :func:`canonical_parts`."""
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@dataclass
class Source:
    """Where some of the canonical tensors come from.

    Attributes:
        entries: what it holds, by canonical name.
        stream: yields each of them once, host tensors that are valid until the next is asked for.
    """

    entries: dict[str, Entry]
    stream: Callable[[], Iterator[tuple[str, Tensor]]]


def from_files(files: TensorFiles, canonical: Callable[[str], str | None]) -> Source:
    """The tensors of ``files``, each under ``canonical(name)``; None leaves a tensor out.

    Raises:
        CheckpointError: two tensors take the same name.
    """
    names: dict[str, str] = {}
    for name in files.entries:
        target = canonical(name)
        if target is not None and names.setdefault(target, name) != name:
            raise CheckpointError(
                f"{files.entries[name].file}: {names[target]} and {name} are two spellings of one tensor; keep one"
            )
    spelled = {name: target for target, name in names.items()}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in files.stream(spelled):
            yield spelled[name], tensor

    return Source({target: files.entries[name] for target, name in names.items()}, stream)


def from_memory(tensors: dict[str, Tensor], file: Path) -> Source:
    """Tensors that are already here; ``file`` is where they came from, for messages."""
    return Source(
        {name: Entry(name, tuple(t.shape), t.dtype, file) for name, t in tensors.items()}, lambda: iter(tensors.items())
    )


def layers_stored_packed(model: Llava, kind: str, sources: list[Source]) -> list[str]:
    """Those of the layers that ``kind`` rounds for which ``sources`` hold quantized weights."""
    present = {name for source in sources for name in source.entries}
    parts = canonical_parts(model.config)
    return [
        layer
        for layer in quantized_layers(model, kind)
        if any(name.removesuffix("weight") + SCALE in present for name, _ in parts[f"{layer}.weight"])
    ]


@torch.no_grad()
def fill(model: Llava, sources: list[Source], *, where: Path, only: str = "", packed: bool = False) -> None:
    """Fill the model's weights in place, each tensor copied from its source to its rows and cast on the way.

    Args:
        model: any device and dtype. Quantized layers round what they are given.
        sources: together they must hold every canonical tensor once and no other.
        where: the checkpoint, for messages.
        only: the weights whose canonical names begin so; default all.
        packed: the sources hold the quantized layers' weights quantized, as :mod:`llava_fast.checkpoint.packed` says.

    Raises:
        CheckpointError: before anything is copied, one error that lists every missing, unexpected, repeated or
            mis-shaped tensor.
    """
    targets = stored_tensors(model, only=only, packed=packed)
    check({name: target.like for name, target in targets.items()}, sources, where)
    for source in sources:
        for name, tensor in source.stream():
            targets[name].put(tensor)
            del tensor  # the source may drop its map


def check(needed: Mapping[str, Tensor], sources: list[Source], where: Path) -> None:
    """Raise one CheckpointError for everything in which the tensors of ``sources`` differ from ``needed``.

    Args:
        needed: by name, of any device: each tells its shape and, unless it is a float of 16 bits or more, for which
            any such float will do, its dtype.
        sources: what is there.
        where: the checkpoint, for messages.
    """
    found: dict[str, Entry] = {}
    repeated = []
    for source in sources:
        repeated += [f"{n} ({found[n].file} and {e.file})" for n, e in source.entries.items() if n in found]
        found |= source.entries
    missing = [name for name in needed if name not in found]
    unexpected = [f"{entry.name} {entry.shape} in {entry.file}" for name, entry in found.items() if name not in needed]
    misshaped = [
        f"{found[name].name} is {found[name].shape} in {found[name].file}, the config makes it {tuple(like.shape)}"
        for name, like in needed.items()
        if name in found and found[name].shape != like.shape
    ]
    other_dtype = [
        f"{found[name].name} is {found[name].dtype} in {found[name].file}"
        for name, like in needed.items()
        if name in found and not _may_become(found[name].dtype, like.dtype)
    ]
    problems = [
        f"{len(names)} {what}: {shorten(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
            ("in two places", repeated),
            ("of a dtype that does not fit", other_dtype),
        )
        if names
    ]
    if problems:
        misfits = [
            entry
            for name, entry in found.items()
            if name not in needed
            or entry.shape != needed[name].shape
            or not _may_become(entry.dtype, needed[name].dtype)
        ]
        raise CheckpointError(f"the weights of {where} do not fit: {'; '.join(problems)}{_hint(misfits)}")


def _may_become(there: torch.dtype, needed: torch.dtype) -> bool:
    """Whether a tensor of dtype ``there`` may be cast: any float of 16 bits or more to any other; the rest is codes."""
    return there == needed or all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in (there, needed))


def _hint(misfits: list[Entry]) -> str:
    """What usually made tensors of a strange shape."""
    if any(entry.shape == (0,) for entry in misfits):
        return (
            ". Tensors of shape (0,) were saved under DeepSpeed ZeRO-3 without gathering their parts: save again with "
            "stage3_gather_16bit_weights_on_model_save, or convert with DeepSpeed's zero_to_fp32.py"
        )
    if any(not e.dtype.is_floating_point or (len(e.shape) == 2 and e.shape[1] == 1) for e in misfits):
        return (
            ". Integer tensors, or of shape (n, 1), are packed 4-bit or 8-bit weights: save the model from a load "
            "without quantization"
        )
    return ""
