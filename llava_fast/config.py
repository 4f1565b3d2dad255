"""ModelConfig: the sizes and choices that define a LLaVA model, and the named presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from llava_fast.errors import ConfigError

IGNORE = -100  # label of a position where nothing is learned
IMAGE_SENTINEL = -200  # image token id of a checkpoint whose vocabulary holds no image token (the authors' files)

PROJECTORS = ("linear", "mlp2x_gelu")
FEATURES = ("patch", "cls_patch")
ASPECTS = ("square", "pad")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP vision transformer."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224  # pixels, square
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A LLaMA decoder."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # as configs carry it: {"rope_type": "linear", "factor": 4.0}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines the network and how images and conversations must be prepared for it.

    Raises:
        ConfigError: on construction, when a name is unknown or sizes do not fit together.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projector: str = "linear"  # "linear" (the paper) or "mlp2x_gelu" (LLaVA-1.5)
    select_layer: int = -2  # which hidden state of the tower is the feature: -2 before the last layer, -1 after it
    select_feature: str = "patch"  # "patch" drops the class token, "cls_patch" keeps it
    image_token_id: int = IMAGE_SENTINEL
    image_start_token_id: int | None = None  # the v0 checkpoints put marker tokens around an image
    image_end_token_id: int | None = None
    image_aspect: str = "square"  # "square" crops, "pad" fills up to a square with the mean colour
    template: str = "v1"  # conversation template that the checkpoint was trained with
    dtype: str | None = None  # what the checkpoint's config.json says its weights are, such as "float16"

    def __post_init__(self) -> None:
        vision, text = self.vision, self.text
        _one_of("projector", self.projector, PROJECTORS)
        _one_of("select_feature", self.select_feature, FEATURES)
        _one_of("image_aspect", self.image_aspect, ASPECTS)
        if not -vision.num_hidden_layers - 1 <= self.select_layer <= -1:
            raise ConfigError(
                f"select_layer={self.select_layer} does not exist in a tower of {vision.num_hidden_layers} layers; "
                f"use -1 (after the last layer) or -2 (before it)"
            )
        if vision.image_size % vision.patch_size:
            raise ConfigError(f"image_size={vision.image_size} is not a multiple of patch_size={vision.patch_size}")
        if vision.hidden_size % vision.num_attention_heads:
            raise ConfigError(
                f"vision hidden_size={vision.hidden_size} does not divide into {vision.num_attention_heads} heads"
            )
        if vision.hidden_act not in ("quick_gelu", "gelu"):
            raise ConfigError(f"vision hidden_act={vision.hidden_act!r} is not supported; use 'quick_gelu' or 'gelu'")
        if text.num_attention_heads % text.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={text.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={text.num_key_value_heads}"
            )
        if text.head_dim % 2:
            raise ConfigError(f"head_dim={text.head_dim} must be even: rotary embedding turns pairs")
        scaling = text.rope_scaling or {}
        _one_of("rope_type", scaling.get("rope_type", scaling.get("type", "default")), ROPE_TYPES)

    @property
    def tokens_per_image(self) -> int:
        """Rows that one image takes in the token sequence, without marker tokens."""
        return self.vision.num_patches + (self.select_feature == "cls_patch")

    @property
    def vision_layers_run(self) -> int:
        """How many of the tower's layers the selected feature needs."""
        return self.vision.num_hidden_layers + 1 + self.select_layer

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @staticmethod
    def preset(name: str) -> ModelConfig:
        """The configuration called ``name``; see :data:`PRESETS`.

        Raises:
            ConfigError: no preset has that name.
        """
        _one_of("preset", name, tuple(PRESETS))
        return PRESETS[name]


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{what}={value!r} is not known; choose one of {', '.join(allowed)}")


_CLIP_L_224 = VisionConfig()
_CLIP_L_336 = VisionConfig(image_size=336)
_VICUNA_7B = TextConfig()
_VICUNA_13B = TextConfig(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
)


def _vicuna_15(text: TextConfig) -> TextConfig:
    return replace(text, rms_norm_eps=1e-5, max_position_embeddings=4096)


def _llava_15(text: TextConfig) -> ModelConfig:
    return ModelConfig(vision=_CLIP_L_336, text=_vicuna_15(text), projector="mlp2x_gelu", image_aspect="pad")


PRESETS: dict[str, ModelConfig] = {
    # The built-in demonstration: small enough to train on two CPU cores in minutes.
    "tiny": ModelConfig(
        vision=VisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=48,
            patch_size=16,
        ),
        text=TextConfig(
            vocab_size=640,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            rms_norm_eps=1e-5,
            max_position_embeddings=1024,
            pad_token_id=3,
        ),
        image_token_id=4,
    ),
    "llava-v1-7b": ModelConfig(vision=_CLIP_L_224, text=_VICUNA_7B),
    "llava-v1-13b": ModelConfig(vision=_CLIP_L_224, text=_VICUNA_13B),
    "llava-1.5-7b": _llava_15(_VICUNA_7B),
    "llava-1.5-13b": _llava_15(_VICUNA_13B),
}
