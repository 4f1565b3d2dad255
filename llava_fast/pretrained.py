"""``llava_fast.load`` and ``llava_fast.save``: a model together with the processor that belongs to it."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_fast.checkpoint import load_model, save_model
from llava_fast.checkpoint.files import read_json, write_json
from llava_fast.config import ModelConfig
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.model import Llava
from llava_fast.model.quantized import check_kind
from llava_fast.processor import ImageProcessor, Processor, Tokenizer

IMAGE, PAD = "<image>", "<pad>"  # what transformers' conversion calls the tokens that it adds
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_DOWNLOADED = ["*.json", "*.safetensors", "*.bin", "*.model"]


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
        quantization: "int8", "int4" or "fp8" to round the decoder's weights as they are read
            (:func:`llava_fast.model.quantized.quantize`); the full model never exists, and what comes out is for
            inference. A directory that a quantized model was saved to needs no mention of it.
        vision_tower: the CLIP directory of an authors' checkpoint, when it is not where its config says.
        base: the LLaMA directory to which an authors' delta checkpoint is added; also its tokenizer where the delta
            has none.

    Raises:
        CheckpointError: no such directory or repository, or weights that cannot be read.
        ConfigError: ``quantization`` is unknown or not what the directory's weights are, or the checkpoint's config
            cannot work.
        TokenizerError: the tokenizer is missing or does not fit.
    """
    if quantization is not None:
        check_kind(quantization)
    directory = find_checkpoint(path_or_hub_id)
    model = load_model(
        directory,
        device=device,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        vision_tower=vision_tower,
        base=base,
    )
    tokenizer = Tokenizer.load(_first_with(_TOKENIZER_FILES, directory, base))
    processor = Processor.from_config(model.config, tokenizer)
    if (directory / "preprocessor_config.json").is_file():
        processor.image = _image_processor(directory, model.config)
    return model, processor


def _first_with(files: tuple[str, ...], directory: Path, base: Path | str | None) -> Path:
    """``directory``, or ``base`` where only that has one of ``files``."""
    if base is None or any((directory / file).is_file() for file in files):
        return directory
    return Path(base)


def _image_processor(directory: Path, config: ModelConfig) -> ImageProcessor:
    image = ImageProcessor.load(directory, aspect=config.image_aspect)
    if image.size != config.vision.image_size:
        raise ConfigError(
            f"{directory}/preprocessor_config.json makes images of {image.size} pixels, the vision tower takes "
            f"{config.vision.image_size}; take the file that belongs to the checkpoint"
        )
    return image


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

        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=_DOWNLOADED))
    except Exception as error:  # offline, unknown id, no access: to the caller there is no checkpoint
        detail = str(error).splitlines()[0] if str(error) else "no detail"
        raise CheckpointError(
            f"{str(path_or_hub_id)!r} is no directory (looked for {directory.absolute()}), and the hub repository "
            f"{str(path_or_hub_id)!r} cannot be downloaded ({type(error).__name__}: {detail})"
        ) from error


def built_in() -> Path:
    """The directory of the model that ships with the package: small, and it knows the built-in scenes alone.

    It is what the demonstration (``python -m llava_fast.train``) trains, rounded to float16.
    """
    return Path(__file__).parent / "built_in"


def save(model: Llava, processor: Processor, directory: Path | str, format: str = "hf") -> None:
    """Write a model and its processor into one directory.

    transformers needs an image token inside the vocabulary. Where the model has none, "hf" gives it one, in model and
    tokenizer alike: the tokenizer's own ``<image>``, a spare row of the embedding table, or else a new row.

    A quantized model is written quantized, and :func:`load` gives back the same bits. Which other software reads such a
    directory depends on the kind; :mod:`llava_fast.checkpoint.packed` says which.

    Args:
        model: what to write.
        processor: the one that belongs to it.
        directory: made when it does not exist.
        format: "hf" for what transformers, vLLM and SGLang load, "authors" for the LLaVA authors' own layout.

    Raises:
        ConfigError: unknown format, or a quantized model and another format than "hf".
    """
    directory = Path(directory)
    image = image_token_of(model.config, processor.tokenizer) if format == "hf" else model.config.image_token_id
    config = save_model(model, directory, format=format, image_token_id=image)
    tokenizer = processor.tokenizer
    grown = config.text.vocab_size > model.config.text.vocab_size
    if config.image_token_id >= tokenizer.vocab_size:
        tokenizer = tokenizer.with_token(IMAGE, config.image_token_id)
    if grown and tokenizer.token_id(PAD) is None:
        tokenizer = tokenizer.with_token(PAD, config.text.pad_token_id)
    Processor(
        tokenizer,
        processor.image,
        template=processor.template,
        image_token_id=config.image_token_id,
        tokens_per_image=processor.tokens_per_image,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        max_length=processor.max_length,
    ).save(directory)
    if grown:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            write_json(directory / name, read_json(directory / name) | {"pad_token": PAD})


def image_token_of(config: ModelConfig, tokenizer: Tokenizer) -> int:
    """The id that is to be the image token: the model's own if its table has it, else the tokenizer's ``<image>``,
    else the first row that the tokenizer leaves unused, else the first id behind the table."""
    if 0 <= config.image_token_id < config.text.vocab_size:
        return config.image_token_id
    known = tokenizer.token_id(IMAGE)
    return min(tokenizer.vocab_size if known is None else known, config.text.vocab_size)
