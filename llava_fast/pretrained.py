"""``llava_fast.load`` and ``llava_fast.save``: a model together with the processor that belongs to it."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_fast.checkpoint import load_model, save_model
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.model import Llava
from llava_fast.processor import Processor, Tokenizer


def load(
    path_or_hub_id: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    quantization: str | None = None,
    vision_tower: Path | str | None = None,
    base: Path | str | None = None,
) -> tuple[Llava, Processor]:
    """A model and its processor.

    Args:
        path_or_hub_id: a checkpoint directory, or where there is none of that name, a repository of the Hugging Face
            hub, which is downloaded.
        device: where to make the model; default the CPU.
        dtype: default the checkpoint's own.
        attention: as for :class:`Llava`.
        quantization: None; nothing else is supported yet.
        vision_tower: the CLIP directory of an authors' checkpoint, when it is not where its config says.
        base: the LLaMA directory to which an authors' delta checkpoint is added; also its tokenizer where the delta
            has none.

    Raises:
        CheckpointError: no such directory or repository, or weights that cannot be read.
        ConfigError: ``quantization`` is given, or the checkpoint's config cannot work.
        TokenizerError: the tokenizer is missing or does not fit.
    """
    if quantization is not None:
        raise ConfigError(f"quantization={quantization!r}: quantized weights are not supported yet; leave it None")
    directory = find_checkpoint(path_or_hub_id)
    model = load_model(directory, device=device, dtype=dtype, attention=attention, vision_tower=vision_tower, base=base)
    return model, Processor.from_config(model.config, Tokenizer.load(directory))


def find_checkpoint(path_or_hub_id: Path | str) -> Path:
    """The directory called so, else the downloaded hub repository of that id.

    Raises:
        CheckpointError: neither exists, or the hub cannot be reached.
    """
    directory = Path(path_or_hub_id)
    if directory.exists():
        return directory
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"])
        )
    except Exception as error:  # offline, unknown id, no access: to the caller there is no checkpoint
        detail = str(error).splitlines()[0] if str(error) else "no detail"
        raise CheckpointError(
            f"{str(path_or_hub_id)!r} is no directory (looked for {directory.absolute()}), and the hub repository "
            f"{str(path_or_hub_id)!r} cannot be downloaded ({type(error).__name__}: {detail})"
        ) from error


def save(model: Llava, processor: Processor, directory: Path | str, format: str = "hf") -> None:
    """Write a model and its processor into one directory.

    Args:
        model: what to write.
        processor: the one that belongs to it.
        directory: made when it does not exist.
        format: "hf" for what transformers, vLLM and SGLang load, "authors" for the LLaVA authors' own layout.

    Raises:
        ConfigError: unknown format.
    """
    save_model(model, directory, format=format)
    processor.save(directory)
