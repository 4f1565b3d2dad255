"""The authors' directories (github.com/haotian-liu/LLaVA): v0, v1 and v1.5, merged or as deltas; read and written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_fast.checkpoint.clip import canonical_clip, clip_source, read_clip_config, save_clip
from llava_fast.checkpoint.files import SHARD_BYTES, Entry, TensorFiles, read_json, shorten, write_json, write_tensors
from llava_fast.checkpoint.huggingface import EXTRAS_KEY, extras, read_extras
from llava_fast.checkpoint.llama import (
    canonical_llama,
    dtype_code,
    dtype_name,
    generation_fields,
    parse_text,
    text_fields,
)
from llava_fast.checkpoint.names import EMBEDDING, HEAD, PROJECTOR, VISION, Source, canonical_tensors, from_files
from llava_fast.checkpoint.projector import authors_projector, canonical_projector
from llava_fast.config import IMAGE_SENTINEL, ModelConfig, TextConfig, VisionConfig
from llava_fast.errors import CheckpointError
from llava_fast.model import Llava

TOWER_FOLDER = "vision_tower"  # where the tower is written, beside the weights that do not hold it
_INSIDE = "model.vision_tower.vision_tower."  # before the names of a tower inside the weights


def is_authors(fields: dict[str, Any]) -> bool:
    """Whether a config.json is of the authors' kind."""
    return "mm_vision_tower" in fields or "mm_hidden_size" in fields


class AuthorsCheckpoint:
    """One of the authors' directories, listed and not yet read.

    Args:
        directory: holds config.json and weights.
        vision_tower: the CLIP directory; default what ``mm_vision_tower`` names (a folder inside the checkpoint, a
            path, or a hub id), unless the weights hold the tower.
        base: a LLaMA directory to which the weights, being a delta, are to be added.
        weights: the directory that holds the weights, where it is another: what a LoRA adapter stands on. Where that
            is a LLaMA directory, the projector is the adapter's to bring.

    Attributes:
        config: the model.

    Raises:
        CheckpointError: a kind that is not supported, or a part that cannot be found.
    """

    def __init__(
        self,
        directory: Path,
        *,
        vision_tower: str | Path | None = None,
        base: str | Path | None = None,
        weights: Path | None = None,
    ):
        self.directory = directory
        self.file = directory / "config.json"
        self.base = None if base is None else Path(base)
        fields = read_json(self.file)
        self.files = TensorFiles.find(weights or directory)
        self._refuse_unsupported(fields)
        inside = [name for name in self.files.entries if name.startswith(_INSIDE)]
        self.tower: Path | None = None
        if vision_tower is not None or not inside:
            self.tower = find_tower([directory, weights or directory], vision_tower or fields.get("mm_vision_tower"))
        vision = read_clip_config(self.tower) if self.tower else self._tower_inside()
        self.config = self._parse(fields, vision)

    def _refuse_unsupported(self, fields: dict[str, Any]) -> None:
        aspect = fields.get("image_aspect_ratio")
        if aspect == "anyres" or "model.image_newline" in self.files.entries:
            raise CheckpointError(
                f"{self.directory} is a LLaVA-NeXT (1.6, anyres) checkpoint, which is not supported; "
                f"take LLaVA v1 or 1.5"
            )
        if aspect not in (None, "square", "pad"):
            raise CheckpointError(
                f"{self.file}: image_aspect_ratio={aspect!r} is not supported; 'square' and 'pad' are"
            )
        tower = fields.get("mm_vision_select_feature", "patch")
        if tower not in ("patch", "cls_patch"):
            raise CheckpointError(
                f"{self.file}: mm_vision_select_feature={tower!r} is not known; it is patch or cls_patch"
            )

    def _parse(self, fields: dict[str, Any], vision: VisionConfig) -> ModelConfig:
        width = fields.get("mm_hidden_size", vision.hidden_size)
        if width != vision.hidden_size:
            raise CheckpointError(
                f"{self.file}: mm_hidden_size={width} but the vision tower {self.tower or self.directory} is "
                f"{vision.hidden_size} wide; give the tower that the projector was trained with"
            )
        text = parse_text(fields, self.file)
        start, end = _markers(self.directory, fields, text)
        known: dict[str, Any] = {
            "image_start_token_id": start,
            "image_end_token_id": end,
            "image_token_id": fields.get(EXTRAS_KEY, {}).get("image_token_id", IMAGE_SENTINEL),
            "image_aspect": fields.get("image_aspect_ratio") or "square",
            # Only the first checkpoints put markers around an image, and those were trained on the first template.
            "template": "v1" if start is None else "v0",
        }
        known |= read_extras(fields)
        return ModelConfig(
            vision=vision,
            text=text,
            projector=fields.get("mm_projector_type") or "linear",
            select_layer=fields.get("mm_vision_select_layer", -2),
            select_feature=fields.get("mm_vision_select_feature", "patch"),
            dtype=dtype_name(fields),
            **known,
        )

    def _tower_inside(self) -> VisionConfig:
        """The sizes of a tower inside the weights, from its tensors; CLIP's heads are 64 wide."""
        entries = {
            canonical_clip(n.removeprefix(_INSIDE)): e for n, e in self.files.entries.items() if n.startswith(_INSIDE)
        }
        try:
            width, _, patch, _ = entries[f"{VISION}embeddings.patch_embedding.weight"].shape
            positions = entries[f"{VISION}embeddings.position_embedding.weight"].shape[0]
            inner = entries[f"{VISION}encoder.layers.0.mlp.fc1.weight"].shape[0]
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.directory} holds part of a vision tower ({error} is missing or mis-shaped); give its CLIP "
                f"directory as vision_tower"
            ) from error
        return VisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=sum(str(n).endswith(".mlp.fc1.weight") for n in entries),
            num_attention_heads=max(1, width // 64),
            image_size=round((positions - 1) ** 0.5) * patch,
            patch_size=patch,
        )

    def sources(self) -> list[Source]:
        """The weights under canonical names."""
        own = from_files(self.files, self._canonical)
        if self.base is not None:
            own = _added(own, self.base, self.directory)
        return [own] if self.tower is None else [own, clip_source(self.tower)]

    def _canonical(self, name: str) -> str | None:
        if name.startswith(_INSIDE):  # a tower given from outside takes its place
            return canonical_clip(name.removeprefix(_INSIDE)) if self.tower is None else None
        return canonical_projector(name) or canonical_llama(name, tied=self.config.text.tie_word_embeddings)


def _markers(directory: Path, fields: dict[str, Any], text: TextConfig) -> tuple[int | None, int | None]:
    """Ids of ``<im_start>`` and ``<im_end>``: from added_tokens.json, else the last two, which were added last."""
    if not fields.get("mm_use_im_start_end", False):
        return None, None
    file = directory / "added_tokens.json"
    added = read_json(file) if file.is_file() else {}
    return added.get("<im_start>", text.vocab_size - 2), added.get("<im_end>", text.vocab_size - 1)


def find_tower(inside: list[Path], named: str | Path | None) -> Path:
    """The CLIP directory called ``named``: a folder in one of ``inside``, a local path, or a hub id to download.

    Raises:
        CheckpointError: it is none of these, or cannot be downloaded.
    """
    directory = inside[0]
    if named is None:
        raise CheckpointError(
            f"{directory} neither holds a vision tower nor names one (mm_vision_tower in config.json); give its CLIP "
            f"directory as vision_tower"
        )
    for place in (*(folder / named for folder in inside), Path(named)):
        if place.is_dir():
            return place
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(named), allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except Exception as error:  # offline, no such repository, not a valid id: the cure is the same
        raise CheckpointError(
            f"the vision tower {str(named)!r} of {directory} is neither a folder nor can it be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); give its CLIP directory as "
            f"vision_tower"
        ) from error


def _added(delta: Source, base_dir: Path, where: Path) -> Source:
    """``delta`` with a base LLaMA added as the authors' apply_delta does, one tensor at a time.

    Embeddings and head may have more rows than the base: only its rows are added to. The projector is kept as it is.
    """
    base = TensorFiles.find(base_dir)
    names = {canonical_llama(n, tied=False): n for n in base.entries}
    wanted = [name for name in delta.entries if not name.startswith((PROJECTOR, VISION))]
    faults = [f"{name} is not in the base" for name in wanted if name not in names]
    for name in wanted:
        if name in names and not _addable(name, delta.entries[name], base.entries[names[name]]):
            faults.append(f"{name} is {delta.entries[name].shape}, in the base {base.entries[names[name]].shape}")
    if faults:
        raise CheckpointError(f"the delta {where} does not belong to the base {base_dir}: {shorten(faults)}")

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in delta.stream():
            if name in names:
                ours = base.read(names[name])
                total = tensor.clone() if tensor.dtype == ours.dtype else tensor.float()
                total[: len(ours)] += ours
                del ours
                yield name, total
            else:
                yield name, tensor

    return Source(delta.entries, stream)


def _addable(name: str, delta: Entry, base: Entry) -> bool:
    taller = name in (EMBEDDING, HEAD) and len(delta.shape) == len(base.shape) == 2 and delta.shape[0] >= base.shape[0]
    return delta.shape == base.shape or (taller and delta.shape[1] == base.shape[1])


def write(
    model: Llava, directory: Path | str, *, shard_bytes: int = SHARD_BYTES, vision_tower: str | None = None
) -> None:
    """Write a directory in the authors' names, as safetensors.

    Args:
        model: what to write.
        directory: made when it does not exist.
        shard_bytes: largest size of a file.
        vision_tower: what to write as ``mm_vision_tower``, such as "openai/clip-vit-large-patch14"; default the folder
            ``vision_tower`` inside ``directory``, into which the tower is written as a CLIP directory.

    Raises:
        ConfigError: the model is quantized.
    """
    directory = Path(directory)
    config = model.config
    linear = config.projector == "linear"
    tensors = {}
    for name, tensor in canonical_tensors(model).items():
        if name.startswith(PROJECTOR):
            tensors[authors_projector(name, linear=linear)] = tensor
        elif not name.startswith(VISION):
            tensors[name.removeprefix("language_model.")] = tensor
    if vision_tower is None:
        save_clip(model, directory / TOWER_FOLDER, shard_bytes=shard_bytes)
    write_tensors(directory, tensors, shard_bytes=shard_bytes)
    write_json(directory / "config.json", config_fields(model, vision_tower=vision_tower or TOWER_FOLDER))
    write_json(directory / "generation_config.json", generation_fields(config.text))


def config_fields(model: Llava, *, vision_tower: str) -> dict[str, Any]:
    """The model's config.json in the authors' terms; ``vision_tower``: where the tower is, a folder or a hub id."""
    config = model.config
    return text_fields(config.text) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": dtype_code(model.dtype),
        "use_cache": True,
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": config.select_feature,
        "mm_use_im_start_end": config.image_start_token_id is not None,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": config.image_aspect,
        EXTRAS_KEY: extras(config) | {"image_token_id": config.image_token_id},
    }
