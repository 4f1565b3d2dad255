"""Directories of transformers' LlavaForConditionalGeneration, of every version since 4.36: read and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_fast.checkpoint.clip import parse_vision, vision_fields
from llava_fast.checkpoint.files import SHARD_BYTES, Made, TensorFiles, read_json, write_json, write_tensors
from llava_fast.checkpoint.llama import dtype_code, dtype_name, generation_fields, parse_text, text_fields
from llava_fast.checkpoint.names import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    TEXT,
    VISION,
    Source,
    check,
    from_files,
    from_memory,
    named,
    stored_tensors,
)
from llava_fast.checkpoint.packed import grown, quantization_fields, stored
from llava_fast.config import IGNORE, ModelConfig
from llava_fast.errors import CheckpointError
from llava_fast.model import Llava
from llava_fast.model.quantized import QuantizedLinear, quantization_of

# The tower of a LlavaConfig without vision_config: CLIP-L/14 at 336 pixels.
_DEFAULT_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_PROJECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}  # projector_hidden_act -> ours
_ACTS = {ours: act for act, ours in _PROJECTORS.items()}
_FEATURES = {"default": "patch", "full": "cls_patch"}  # vision_feature_select_strategy -> ours
_STRATEGIES = {ours: strategy for strategy, ours in _FEATURES.items()}
_HEAD = HEAD.removesuffix("weight")  # a quantized head is several tensors
_FOUR = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
# What ModelConfig knows and transformers does not; kept in config.json under this key.
EXTRAS_KEY = "llava_fast"
_EXTRAS = ("template", "image_aspect", "image_start_token_id", "image_end_token_id")


def read_config(directory: Path) -> ModelConfig:
    """The model that a transformers LLaVA directory holds.

    Raises:
        CheckpointError: the config asks for something that llava_fast does not have.
        ConfigError: sizes that do not fit together.
    """
    file = directory / "config.json"
    fields = read_json(file)
    text = parse_text(_text_fields_of(fields, file), file)
    vision = parse_vision(fields.get("vision_config") or _DEFAULT_TOWER, file)
    act = _choice(fields, "projector_hidden_act", "gelu", _PROJECTORS, file)
    feature = _choice(fields, "vision_feature_select_strategy", "default", _FEATURES, file)
    layer = fields.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(
            f"{file}: vision_feature_layer={layer!r} is not supported; only one layer's features are used, such as -2"
        )
    return ModelConfig(
        vision=vision,
        text=text,
        projector=act,
        select_layer=layer if layer < 0 else layer - vision.num_hidden_layers - 1,
        select_feature=feature,
        image_token_id=fields.get("image_token_index", fields.get("image_token_id", 32000)),
        dtype=dtype_name(fields) or dtype_name(fields.get("text_config") or {}),
        **({"image_aspect": _image_aspect(directory)} | read_extras(fields)),
    )


def _text_fields_of(fields: dict[str, Any], file: Path) -> dict[str, Any]:
    text = dict(fields.get("text_config") or {})
    if text.get("model_type", "llama") != "llama":
        raise CheckpointError(f"{file}: a decoder of type {text['model_type']!r} is not supported; only LLaMA is")
    # Some versions keep these on top alone.
    text["tie_word_embeddings"] = text.get("tie_word_embeddings") or fields.get("tie_word_embeddings", False)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if fields.get(name) is not None:
            text[name] = fields[name]
    return text


def _choice(fields: dict[str, Any], name: str, default: str, known: dict[str, str], file: Path) -> str:
    value = fields.get(name, default)
    if value not in known:
        raise CheckpointError(f"{file}: {name}={value!r} is not supported; llava_fast knows {', '.join(known)}")
    return known[value]


def _image_aspect(directory: Path) -> str:
    images, everything = directory / "preprocessor_config.json", directory / "processor_config.json"
    if images.is_file():
        fields = read_json(images)
    else:  # transformers 5 writes one file
        fields = read_json(everything).get("image_processor", {}) if everything.is_file() else {}
    return "pad" if fields.get("do_pad") else "square"


def read_extras(fields: dict[str, Any]) -> dict[str, Any]:
    """What llava_fast wrote into a config.json for itself; empty for everybody else's."""
    return {name: value for name, value in fields.get(EXTRAS_KEY, {}).items() if name in _EXTRAS}


def sources(directory: Path, config: ModelConfig) -> list[Source]:
    """The weights of a transformers LLaVA directory under canonical names, in whatever layout they stand.

    A projector without biases gets zeros; one whose activation is ``linear`` is folded into a single product.
    """
    files = TensorFiles.find(directory)
    biased = read_json(directory / "config.json").get("multimodal_projector_bias", True)
    plain = config.projector == "mlp2x_gelu" and biased

    def rest(name: str) -> str | None:
        target = canonical_hub(name)
        if target is None or (config.text.tie_word_embeddings and target.startswith(_HEAD)):
            return None
        return None if target.startswith(PROJECTOR) and not plain else target

    if plain:
        return [from_files(files, rest)]
    return [from_files(files, rest), _projector_source(directory, files, config, biased)]


def _projector_source(directory: Path, files: TensorFiles, config: ModelConfig, biased: bool) -> Source:
    names = {name: canonical_hub(name) or "" for name in files.entries}
    tensors = {names[n]: t.clone() for n, t in files.stream(n for n in names if names[n].startswith(PROJECTOR))}
    if not biased:
        for layer in ("linear_1", "linear_2"):
            tensors.setdefault(f"{PROJECTOR}{layer}.bias", torch.zeros(config.text.hidden_size))
    check(projector_shapes(config), [from_memory(tensors, directory)], directory)
    return from_memory(tensors if config.projector == "mlp2x_gelu" else fold_linear(tensors), directory)


def projector_shapes(config: ModelConfig) -> dict[str, Tensor]:
    """The projector of transformers' class, which always has two layers, on the meta device."""
    dim, width = config.text.hidden_size, config.vision.hidden_size
    shapes = ((dim, width), (dim,), (dim, dim), (dim,))
    return {f"{PROJECTOR}{name}": torch.empty(shape, device="meta") for name, shape in zip(_FOUR, shapes, strict=True)}


def canonical_hub(name: str) -> str | None:
    """The canonical name of a tensor in any of the layouts that transformers has written.

    Hub files and transformers <= 4.51: ``language_model.model.*``, ``vision_tower.vision_model.*``; 4.52 and later in
    memory: ``model.language_model.*``, ``lm_head``; 5.2 and later: ``vision_tower.*`` without ``vision_model``.
    """
    if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return None
    bare = name.removeprefix("model.")
    if bare.startswith("lm_head."):
        return f"language_model.{bare}"
    for short, full in (("language_model.", TEXT), ("vision_tower.", VISION)):
        if bare.startswith(short) and not bare.startswith((full, _HEAD)):
            return full + bare.removeprefix(short)
    return bare


def fold_linear(projector: dict[str, Tensor]) -> dict[str, Tensor]:
    """``linear_2(linear_1(x))`` as one ``linear_1``: exactly it where ``linear_2`` is the identity, else in float32.

    projector: the four canonical tensors, weights (D, C) and (D, D), biases (D,).
    """
    w1, b1, w2, b2 = (projector[f"{PROJECTOR}{name}"] for name in _FOUR)
    if not torch.equal(w2, torch.eye(len(w2), dtype=w2.dtype)) or b2.any():
        w1, b1 = w2.float() @ w1.float(), w2.float() @ b1.float() + b2.float()
    return {f"{PROJECTOR}{_FOUR[0]}": w1, f"{PROJECTOR}{_FOUR[1]}": b1}


def second_linear(bias: Tensor) -> dict[str, Tensor]:
    """A second projector layer that changes nothing, as transformers' class needs one; bias: (D,), the first one's."""
    return {
        f"{PROJECTOR}{_FOUR[2]}": torch.eye(len(bias), dtype=bias.dtype),
        f"{PROJECTOR}{_FOUR[3]}": torch.zeros(len(bias), dtype=bias.dtype),
    }


def vocabulary_for_transformers(config: ModelConfig) -> ModelConfig:
    """``config`` with an image token inside its vocabulary, as transformers needs one: unchanged where it has one.

    Otherwise grown as transformers' own conversion does: ``<image>`` is the first new id, ``<pad>`` the second, and
    the table is filled up to a multiple of 64.
    """
    old = config.text.vocab_size
    if 0 <= config.image_token_id < old:
        return config
    text = replace(config.text, vocab_size=-(-(old + 2) // 64) * 64, pad_token_id=old + 1)
    return config.replace(text=text, image_token_id=old)


def write(
    model: Llava, directory: Path | str, *, shard_bytes: int = SHARD_BYTES, image_token_id: int | None = None
) -> ModelConfig:
    """Write config.json, generation_config.json and weights, which transformers 4.46 and 5 load completely.

    ``image_token_id`` replaces the model's own. Rows that the vocabulary must grow by
    (:func:`vocabulary_for_transformers`) are the mean of the old rows. A quantized model is written as
    :mod:`llava_fast.checkpoint.packed` says, one weight at a time.

    Returns:
        The config that was written; its ids are what the tokenizer files must agree with.
    """
    directory = Path(directory)
    image = model.config.image_token_id if image_token_id is None else image_token_id
    config = vocabulary_for_transformers(model.config.replace(image_token_id=image, dtype=dtype_code(model.dtype)))
    tensors = {name: one.tensor for name, one in stored_tensors(model).items()}
    if config.text.vocab_size > model.config.text.vocab_size:
        tensors |= _grown_vocabulary(model, config.text.vocab_size)
    if config.projector == "linear":
        tensors |= second_linear(model.projector.linear_1.bias)
    fields = config_fields(config)
    if (kind := quantization_of(model)) is not None:
        head = isinstance(model.lm_head, QuantizedLinear)
        fields["quantization_config"] = quantization_fields(kind, head=head)
    write_tensors(directory, tensors, shard_bytes=shard_bytes)
    write_json(directory / "config.json", fields)
    write_json(directory / "generation_config.json", generation_fields(config.text))
    return config


def _grown_vocabulary(model: Llava, rows: int) -> dict[str, Tensor | Made]:
    """Embeddings and head with ``rows`` tokens, by canonical name."""
    tensors: dict[str, Tensor | Made] = {EMBEDDING: _grow(model.decoder.embed_tokens.detach(), rows)}
    if isinstance(model.lm_head, QuantizedLinear):
        parts = stored(grown(model.lm_head, rows), slice(0, rows))
        return tensors | {name: one.tensor for name, one in named(HEAD, parts).items()}
    if model.lm_head is not None:
        tensors[HEAD] = _grow(model.lm_head.weight.detach(), rows)
    return tensors


def _grow(table: Tensor, rows: int) -> Tensor:
    mean = table.float().mean(0, keepdim=True).to(table.dtype)  # (1, D)
    return torch.cat((table, mean.expand(rows - len(table), -1)))


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """``config`` as a LlavaConfig in JSON, in the form that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": config.dtype,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.tokens_per_image,
        "ignore_index": IGNORE,
        "pad_token_id": config.text.pad_token_id,
        "projector_hidden_act": _ACTS[config.projector],
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": _STRATEGIES[config.select_feature],
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": {"architectures": ["LlamaForCausalLM"], "torch_dtype": config.dtype} | text_fields(config.text),
        "vision_config": vision_fields(config.vision),
        EXTRAS_KEY: extras(config),
    }


def extras(config: ModelConfig) -> dict[str, Any]:
    """What only llava_fast reads of its config.json."""
    return {name: getattr(config, name) for name in _EXTRAS}
