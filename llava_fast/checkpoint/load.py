"""Finding out which format a checkpoint directory has, from its config and keys and never from its name."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_fast.checkpoint import adapter as adapters
from llava_fast.checkpoint import authors, huggingface
from llava_fast.checkpoint.adapter import Adapter, is_adapter
from llava_fast.checkpoint.dtypes import first_dtype
from llava_fast.checkpoint.files import SHARD_BYTES, read_json
from llava_fast.checkpoint.names import EMBEDDING, Source, fill, layers_stored_packed
from llava_fast.checkpoint.packed import stored_kind
from llava_fast.config import ModelConfig
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.model import Llava
from llava_fast.model.lora import lora_of
from llava_fast.model.memory import give_memory
from llava_fast.model.quantized import check_kind, put_empty, quantized_layers

FORMATS = ("hf", "authors")


def load_model(
    path: Path | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    quantization: str | None = None,
    vision_tower: Path | str | None = None,
    base: Path | str | None = None,
    merge_adapter: bool = True,
) -> Llava:
    """The model in a directory of transformers' or of the authors' kind, or that a LoRA adapter makes of its base.

    The model is made empty and filled in place, tensor by tensor: its weights exist once. With ``quantization`` they
    are rounded as they arrive, from the precision that the files have, so the full model never exists.

    Args:
        path: the directory.
        device: where to make it; default the CPU.
        dtype: default the checkpoint's own: what its config names, else that of its token embeddings.
        attention: as for :class:`Llava`.
        quantization: what :func:`llava_fast.model.quantized.quantize` is to make of the weights; default what they are
            in the directory, which may be quantized (:mod:`llava_fast.checkpoint.packed`).
        vision_tower: the CLIP directory of an authors' checkpoint, when it is not where ``mm_vision_tower`` says.
        base: the LLaMA directory to which an authors' delta checkpoint is added; of an adapter, what it stands on, when
            that is not where its config says.
        merge_adapter: add an adapter's updates to the weights, in float32, as they are read; else they stay beside them
            and can be trained further.

    Raises:
        CheckpointError: not a LLaVA checkpoint, a kind that is not supported, a damaged file, or tensors that are
            missing, unexpected or mis-shaped; weights quantized in a form that is not read; an adapter that does not
            belong to its base.
        ConfigError: a config that cannot work; ``quantization`` unknown, or another than the directory's own.
    """
    if quantization is not None:
        check_kind(quantization)
    directory = Path(path)
    adapter = Adapter(directory) if is_adapter(directory) else None
    if adapter is not None:
        config, sources, present = _open_adapted(adapter, vision_tower, base, merge_adapter)
    else:
        config, sources, present = _open(directory, vision_tower, base)
    if present is not None and quantization not in (None, present):
        raise ConfigError(
            f"quantization={quantization!r}: the weights of {directory} are {present} already; leave it None, or load "
            f"the checkpoint from before quantization"
        )
    embedding = next((s.entries[EMBEDDING] for s in sources if EMBEDDING in s.entries), None)
    dtype = dtype or first_dtype(config.dtype, embedding)
    kind = present or quantization
    # What is to be replaced by quantized layers takes no memory before.
    model = Llava(config, device=device if kind is None else "meta", dtype=dtype, seed=None, attention=attention)
    if kind is not None:
        names = layers_stored_packed(model, kind, sources) if present else quantized_layers(model, kind)
        _make_quantized(model, kind, names, device)
    fill(model, sources, where=directory, packed=present is not None)
    if adapter is not None and not merge_adapter:
        adapter.attach_to(model)
    return model


def _make_quantized(model: Llava, kind: str, names: list[str], device: torch.device | str | None) -> None:
    """Give a model on the meta device quantized layers in the places called ``names``, and memory to be filled."""
    for name in names:
        put_empty(model, kind, name)
    model.requires_grad_(False)
    give_memory(model, device or "cpu")
    model.decoder.reset_rope()


def config_of(path: Path | str, *, vision_tower: Path | str | None = None) -> ModelConfig:
    """The config of a checkpoint directory, no weights read; raises as :func:`load_model` does."""
    directory = Path(path)
    if is_adapter(directory) and not _brings_config(directory):
        adapter = Adapter(directory)
        return config_of(adapter.find_base(None), vision_tower=vision_tower).replace(**adapter.extras())
    if _is_authors(directory):
        return authors.AuthorsCheckpoint(directory, vision_tower=vision_tower).config
    return huggingface.read_config(directory)


def save_model(
    model: Llava,
    directory: Path | str,
    *,
    format: str = "hf",
    shard_bytes: int = SHARD_BYTES,
    image_token_id: int | None = None,
) -> ModelConfig:
    """Write the model as transformers' ("hf") or the authors' ("authors") kind of directory, without tokenizer files.

    Of a model with LoRA adapters these and the projector are written (:func:`llava_fast.checkpoint.adapter.write`).

    Args:
        model: what to write.
        directory: made when it does not exist.
        format: "hf" or "authors".
        shard_bytes: largest size of a weight file.
        image_token_id: what "hf" writes as the image token; default the model's.

    Returns:
        The config as written: "hf" gives the model an image token inside its vocabulary where it has none.

    Raises:
        ConfigError: unknown format, or a quantized model and another format than "hf".
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not known; choose one of {', '.join(FORMATS)}")
    if lora_of(model) is not None:
        if format != "hf":
            raise ConfigError(
                f"format={format!r}: the model has LoRA adapters, which are saved in PEFT's format alone; merge them "
                f"first (llava_fast.model.lora.merge) to write whole weights"
            )
        adapters.write(model, directory)
        return model.config
    if format == "hf":
        return huggingface.write(model, directory, shard_bytes=shard_bytes, image_token_id=image_token_id)
    authors.write(model, directory, shard_bytes=shard_bytes)
    return model.config


def _open(
    directory: Path, vision_tower: Path | str | None, base: Path | str | None
) -> tuple[ModelConfig, list[Source], str | None]:
    """The model, its weights, and the kind of quantized weights that they are."""
    is_authors = _is_authors(directory)
    present = stored_kind(read_json(directory / "config.json"), directory / "config.json")
    if is_authors:
        checkpoint = authors.AuthorsCheckpoint(directory, vision_tower=vision_tower, base=base)
        return checkpoint.config, checkpoint.sources(), present
    if vision_tower is not None or base is not None:
        given = "vision_tower" if vision_tower is not None else "base"
        raise CheckpointError(
            f"{directory} is a transformers LLaVA checkpoint, which is whole; {given} belongs to the authors' format"
        )
    config = huggingface.read_config(directory)
    return config, huggingface.sources(directory, config), present


def _open_adapted(
    adapter: Adapter, vision_tower: Path | str | None, base: Path | str | None, merge: bool
) -> tuple[ModelConfig, list[Source], str | None]:
    """As :func:`_open`, of an adapter: its base with its own weights in it. An authors' adapter brings its config."""
    directory, below = adapter.directory, adapter.find_base(base)
    if _brings_config(directory):
        checkpoint = authors.AuthorsCheckpoint(directory, vision_tower=vision_tower, weights=below)
        config, sources, present = checkpoint.config, checkpoint.sources(), None
    else:
        config, sources, present = _open(below, vision_tower, None)
        config = config.replace(**adapter.extras())
    if present is not None:
        raise CheckpointError(
            f"the base {below} of the adapter {directory} is quantized to {present}, to which nothing can be added; "
            f"give the base from before quantization, as base"
        )
    return config, adapter.applied(config, sources, low_rank=merge), None


def _brings_config(adapter: Path) -> bool:
    """Whether the directory of an adapter describes the whole model, as the authors' do."""
    return (adapter / "config.json").is_file() and authors.is_authors(read_json(adapter / "config.json"))


def _is_authors(directory: Path) -> bool:
    """Whether the directory is of the authors' kind; it is of transformers' otherwise.

    Raises:
        CheckpointError: it is neither, with what it is instead.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give the folder that holds config.json and the weights")
    fields = read_json(directory / "config.json")
    if authors.is_authors(fields):
        return True
    kind = fields.get("model_type")
    if kind == "llava":
        return False
    if kind in ("llama", "clip", "clip_vision_model"):
        raise CheckpointError(
            f"{directory} is a {kind} checkpoint, one part of LLaVA; llava_fast.checkpoint.join makes a model of a "
            f"CLIP and a LLaMA directory"
        )
    raise CheckpointError(
        f"{directory}: model_type={kind!r} in config.json is not supported; llava_fast reads LLaVA v0 to 1.5"
    )
