"""CLIP directories: ``config.json`` and weights of a CLIPModel or CLIPVisionModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_fast.checkpoint.files import SHARD_BYTES, TensorFiles, read_json, write_json, write_tensors
from llava_fast.checkpoint.llama import dtype_code
from llava_fast.checkpoint.names import VISION, Source, canonical_tensors, from_files
from llava_fast.config import VisionConfig
from llava_fast.errors import CheckpointError
from llava_fast.model import Llava

# transformers' CLIPVisionConfig, which is CLIP-B/32: what a config.json means where it leaves a field out.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
# OpenAI CLIP's pixel statistics, RGB in 0..1.
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def parse_vision(fields: dict[str, Any], file: Path) -> VisionConfig:
    """The tower that ``fields`` of ``file`` (a CLIPVisionConfig as JSON) describe.

    Raises:
        CheckpointError: a tower of another kind, such as SigLIP.
    """
    kind = fields.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise CheckpointError(f"{file}: a vision tower of type {kind!r} is not supported; llava_fast reads CLIP towers")
    return VisionConfig(**{name: fields.get(name, default) for name, default in _DEFAULTS.items()})


def vision_fields(config: VisionConfig) -> dict[str, Any]:
    """``config`` as a CLIPVisionConfig in JSON."""
    return {"model_type": "clip_vision_model"} | {name: getattr(config, name) for name in _DEFAULTS}


def read_clip_config(directory: Path) -> VisionConfig:
    """The tower of a CLIP directory.

    Raises:
        CheckpointError: no config.json, or one of another kind of model.
    """
    file = directory / "config.json"
    fields = read_json(file)
    return parse_vision(fields.get("vision_config") or fields, file)


def clip_source(directory: Path) -> Source:
    """The weights of a CLIP directory; a CLIPModel's text half is left out."""
    return from_files(TensorFiles.find(directory), canonical_clip)


def canonical_clip(name: str) -> str | None:
    """The canonical name of a tensor in a CLIP file, with or without ``vision_model.`` before it."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
        return None
    return None if name.endswith("embeddings.position_ids") else VISION + name.removeprefix("vision_model.")


def save_clip(model: Llava, directory: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the vision tower as a CLIPVisionModel directory, with the preprocessor settings that go with it."""
    directory = Path(directory)
    prefix = "vision_tower."
    tensors = {n.removeprefix(prefix): t for n, t in canonical_tensors(model, only=prefix).items()}
    write_tensors(directory, tensors, shard_bytes=shard_bytes)
    size = model.config.vision.image_size
    head = {"architectures": ["CLIPVisionModel"], "torch_dtype": dtype_code(model.dtype)}
    write_json(directory / "config.json", head | vision_fields(model.config.vision))
    write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": _MEAN,
            "image_std": _STD,
        },
    )
