"""LLaMA and Vicuna directories: ``config.json`` and weights of a LlamaForCausalLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_fast.checkpoint.files import SHARD_BYTES, TensorFiles, read_json, write_json, write_tensors
from llava_fast.checkpoint.names import Source, canonical_tensors, from_files
from llava_fast.config import TextConfig
from llava_fast.errors import CheckpointError
from llava_fast.model import Llava

_PREFIX = "language_model."
# transformers' LlamaConfig, which is LLaMA-7B: what a config.json means where it leaves a field out.
_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}


def parse_text(fields: dict[str, Any], file: Path) -> TextConfig:
    """The decoder that ``fields`` of ``file`` (a LlamaConfig as JSON, of transformers 4 or 5) describe.

    Raises:
        CheckpointError: something that a LLaMA decoder here does not have, such as biases.
    """
    for name, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if fields.get(name, only) != only:
            raise CheckpointError(f"{file}: {name}={fields[name]!r} is not supported; only {only!r} is")
    sizes = {name: fields.get(name, default) for name, default in _SIZES.items()}
    heads = sizes["num_attention_heads"]
    theta, scaling = _parse_rope(fields)
    return TextConfig(
        **sizes,
        num_key_value_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or sizes["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        bos_token_id=_token_id(fields.get("bos_token_id"), 1),
        eos_token_id=_token_id(fields.get("eos_token_id"), 2),
        pad_token_id=_token_id(fields.get("pad_token_id"), 0),
    )


def _parse_rope(fields: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling: ``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` before it."""
    scaling = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    return float(theta), None if kind == "default" else {"rope_type": kind} | scaling


def _token_id(value: int | list[int] | None, default: int) -> int:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and first >= 0 else default


def text_fields(config: TextConfig) -> dict[str, Any]:
    """``config`` as a LlamaConfig in JSON, in the form that transformers 4 and 5 both read."""
    names = (*_SIZES, "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings")
    names += ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"model_type": "llama", "hidden_act": "silu"} | {name: getattr(config, name) for name in names}


def read_llama_config(directory: Path) -> tuple[TextConfig, str | None]:
    """The decoder of a LLaMA directory, and the dtype that its config names.

    Raises:
        CheckpointError: no config.json, or one of another kind of model.
    """
    file = directory / "config.json"
    fields = read_json(file)
    if fields.get("model_type", "llama") != "llama":
        raise CheckpointError(
            f"{file}: model_type={fields['model_type']!r} is not a LLaMA decoder; give a LLaMA or Vicuna directory"
        )
    return parse_text(fields, file), dtype_name(fields)


def dtype_name(fields: dict[str, Any]) -> str | None:
    """The dtype that a config names (``dtype`` in transformers 5, ``torch_dtype`` before), such as "float16"."""
    name = fields.get("dtype") or fields.get("torch_dtype")
    return name.removeprefix("torch.") if isinstance(name, str) and name != "auto" else None


def dtype_code(dtype: torch.dtype) -> str:
    """How a config names ``dtype``, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def llama_source(directory: Path, *, tied: bool) -> Source:
    """The weights of a LLaMA directory; a head that is ``tied`` to the embeddings is left out."""
    return from_files(TensorFiles.find(directory), lambda name: canonical_llama(name, tied=tied))


def canonical_llama(name: str, *, tied: bool) -> str | None:
    """The canonical name of a tensor in a LLaMA file; None for old files' rotary frequencies and a tied head."""
    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
        return None
    return _PREFIX + name


def save_llama(model: Llava, directory: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the decoder and its head as a LlamaForCausalLM directory; tokenizer files are the processor's to write.

    Raises:
        ConfigError: the model is quantized.
    """
    directory = Path(directory)
    tensors = {n.removeprefix(_PREFIX): t for n, t in canonical_tensors(model, only=_PREFIX).items()}
    write_tensors(directory, tensors, shard_bytes=shard_bytes)
    head = {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype_code(model.dtype)}
    write_json(directory / "config.json", head | text_fields(model.config.text))
    write_json(directory / "generation_config.json", generation_fields(model.config.text))


def generation_fields(config: TextConfig) -> dict[str, Any]:
    """generation_config.json: the tokens that transformers' ``generate`` needs."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
