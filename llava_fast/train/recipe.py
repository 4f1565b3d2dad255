"""Recipe: every choice of a training stage, and the named recipes of the paper and of LLaVA-1.5."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.model.lora import TARGETS, LoraConfig


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training stage. Each field is an option of the command line."""

    stage: int = option(1, "1 trains the projector alone, 2 the projector and the decoder")
    epochs: int = option(1, "passes over the data")
    batch_size: int = option(128, "samples in an optimizer step, on average: samples are packed into bins")
    lr: float = option(2e-3, "peak learning rate")
    projector_lr: float | None = option(None, "the projector's own peak learning rate (mm_projector_lr)")
    warmup_ratio: float = option(0.03, "share of the steps with a rising learning rate; a cosine to 0 follows")
    weight_decay: float = option(0.0, "AdamW's, on matrices only")
    grad_clip: float = option(1.0, "largest gradient norm; 0 does not clip")
    optimizer: str = option(
        "adamw",
        "AdamW with float32 moments, with moments in 8 bits (torchao), or with masters and moments on the host",
        ("adamw", "adamw-8bit", "adamw-offload"),
    )
    lora_rank: int = option(0, "stage 2 trains LoRA adapters of this rank and the projector; 0 trains every weight")
    lora_alpha: float = option(16.0, "the adapters' updates are multiplied by alpha / rank")
    lora_dropout: float = option(0.05, "share of the adapters' inputs that is zeroed in training")
    lora_targets: str = option(",".join(TARGETS), "projections of the decoder that get adapters, separated by commas")
    lora_bits: int | None = option(None, "4: the weights below the adapters are in 4 bits (QLoRA; needs CUDA)")
    template: str | None = option(None, "conversation template; default the model's")
    mask: str = option(
        "answers", "what is learned: answers and their stops, or what the authors' code trains", ("answers", "official")
    )
    image_position: str = option(
        "random",
        "image before or after the first question: drawn at random (equation 2), always first, or as the data has it",
        ("random", "first", "as_written"),
    )
    max_length: int = option(2048, "longest sample in tokens, image rows counted; the rest is cut off")
    max_tokens: int = option(8192, "most tokens in a forward pass; a step takes several when its samples need more")
    feature_cache: str | None = option(None, "folder for the frozen tower's features, worked out once for all epochs")
    feature_cache_dtype: str = option("bfloat16", "what the cache keeps features in", ("bfloat16", "float32"))
    seed: int = option(0, "of the data order, the image placement and fresh weights")
    activation_checkpointing: str = option(
        "none",
        "what the backward pass computes anew to save memory: nothing; norms, rotation and SwiGLU; whole layers",
        ("none", "selective", "full"),
    )
    fp8_frozen: bool = option(False, "stage 1: the frozen decoder's products in float8 (on CUDA sm_89 and later)")
    fp8: bool = option(False, "stage 2: the trained decoder's products in float8 (torchao; CUDA sm_89 and later)")
    compile: bool = option(False, "compile the decoder's layers (torch.compile)")
    profile: bool = option(False, "write trace.json and profile.txt of a few steps into the run's folder")
    shard_size: int | None = option(None, "processes that share one copy of the weights; default those of a node")
    shard_frozen: bool = option(False, "share a frozen decoder out among processes too, instead of one copy on each")
    log_every: int = option(10, "steps between two log lines")
    save_every: int = option(200, "steps between two checkpoints")
    keep: int = option(2, "checkpoints that are kept")
    eval_every: int = option(200, "steps between two evaluations, when there is evaluation data")
    on_bad_sample: str = option(
        "stop", "a sample that cannot be used stops the run, or is skipped and counted", ("stop", "skip")
    )
    workers: int | None = option(None, "data worker processes; default one a core up to 8, less the main one")

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "max_length",
            "max_tokens",
            "log_every",
            "save_every",
            "keep",
            "eval_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.stage not in (1, 2):
            raise ConfigError(f"stage={self.stage} does not exist; choose 1 (projector) or 2 (projector and decoder)")
        if self.compile and self.activation_checkpointing == "selective":
            raise ConfigError(
                "compile=True and activation_checkpointing='selective' do not go together: compiled layers already "
                "compute anew what is cheap; choose none or full"
            )
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr} must be above 0")
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank={self.lora_rank} must be at least 1, or 0 to train every weight")
        if self.lora_rank and self.stage == 1:
            raise ConfigError("LoRA adapts the decoder, which stage 1 leaves alone; add --stage 2 or drop --lora-rank")
        if self.lora_bits is not None and (self.lora_bits != 4 or not self.lora_rank):
            raise ConfigError(f"lora_bits={self.lora_bits}: 4 is the one choice, and it needs --lora-rank")
        if self.lora_rank:
            self.lora()
        if self.fp8_frozen and (self.stage != 1 or self.shard_frozen):
            cause = "is of stage 1, whose decoder is frozen; stage 2 has --fp8"
            if self.stage == 1:
                cause = (
                    "keeps the decoder whole on each device, and --shard-frozen would share it out; give one of them"
                )
            raise ConfigError(f"--fp8-frozen {cause}")
        if self.fp8 and (self.stage != 2 or self.lora_rank):
            raise ConfigError("--fp8 trains the whole decoder in stage 2; stage 1 has --fp8-frozen, LoRA has neither")

    def lora(self, *, base: str | None = None, vision_tower: str | None = None) -> LoraConfig:
        """The adapters that this recipe trains; what they stand on is as :class:`LoraConfig` says."""
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=tuple(name.strip() for name in self.lora_targets.split(",")),
            base=base,
            vision_tower=vision_tower,
        )


_ALIGN = {"stage": 1, "lr": 2e-3, "batch_size": 128}
_INSTRUCT = {"stage": 2, "lr": 2e-5, "batch_size": 32, "epochs": 3}

_TINY = {"image_position": "first", "log_every": 25}

RECIPES: dict[str, dict[str, Any]] = {
    # "Visual Instruction Tuning", section 5 and appendix C: AdamW without weight decay, cosine, 3% warm-up.
    "paper-stage1": {**_ALIGN, "template": "v0"},
    "paper-stage2": {**_INSTRUCT, "template": "v0"},
    "scienceqa": {**_INSTRUCT, "epochs": 12, "template": "v0"},
    # LLaVA-1.5: captions alone in stage 1, the v1 conversation in stage 2.
    "llava-1.5-stage1": {"stage": 1, "lr": 1e-3, "batch_size": 256, "template": "plain", "image_position": "first"},
    "llava-1.5-stage2": {"stage": 2, "lr": 2e-5, "batch_size": 128, "template": "v1", "image_position": "first"},
    # Its finetune_lora.sh: adapters at 2e-4, the projector at 2e-5; the authors' default dropout.
    "llava-1.5-lora": {
        "stage": 2,
        "lr": 2e-4,
        "projector_lr": 2e-5,
        "batch_size": 128,
        "lora_rank": 128,
        "lora_alpha": 256.0,
        "template": "v1",
        "image_position": "first",
    },
    # The built-in demonstration.
    "tiny-stage1": {"stage": 1, "lr": 5e-3, "batch_size": 64, "template": "v1", "save_every": 50, **_TINY},
    "tiny-stage2": {"stage": 2, "lr": 2e-3, "batch_size": 8, "template": "v1", "eval_every": 500, **_TINY},
}


def recipe(name: str, **changes: Any) -> Recipe:
    """The named recipe with some fields changed.

    Raises:
        ConfigError: no recipe has that name, or a value that cannot work.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe={name!r} is not known; choose one of {', '.join(RECIPES)}")
    return Recipe(**{**RECIPES[name], **changes})
