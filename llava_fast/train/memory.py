"""How much device memory a run will take, worked out before it starts: no device is needed, and no weights are.

    python -m llava_fast.train.memory --preset llava-1.5-7b --stage 2 --devices 8 --activation-checkpointing full

What a step takes beyond weights and optimizer is not a formula but a trial: the model's own forward and backward pass
on tensors that have shapes and no contents, with every storage counted from its making to its end. Two trials, with two
layers and with four, give the share of a layer; the rest is a straight line.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llava_fast.batch import PackedBatch
from llava_fast.config import IGNORE, PRESETS, ModelConfig
from llava_fast.errors import ConfigError
from llava_fast.model import Llava
from llava_fast.model.decoder import Attend, turned
from llava_fast.model.fp8 import Fp8Linear
from llava_fast.model.lora import LoraConfig, attach, lora_of
from llava_fast.model.nf4 import Nf4Linear
from llava_fast.train.recipe import Recipe
from llava_fast.train.stages import freeze
from llava_kernels import implementation
from llava_kernels.attention.triton_varlen import TRITON

# Bytes of AdamW's moments for a parameter on the device; in 8 bits, with a float32 scale for 256 values of each.
MOMENTS = {"adamw": 8.0, "adamw-8bit": 2 * (1 + 4 / 256), "adamw-offload": 0.0}


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device.

    Attributes:
        weights: what the model computes with, as it lies between two steps.
        masters: float32 copies of what is trained, where the weights are not float32 themselves.
        moments: AdamW's two.
        gradients: float32 sums of what is trained.
        gathered: at most, of layers that are gathered from all ranks for the moment.
        step: activations and all else that a forward and backward pass over the fullest bin takes at its peak.
        host: of the host's memory, for each device: what the optimizer keeps there. Not in the total.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    gathered: int
    step: int
    host: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host

    def __str__(self) -> str:
        parts = {k: v for k, v in dataclasses.asdict(self).items() if v and k != "host"}
        told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        host = f"; and {self.host / 1e9:.2f} GB of the host's memory for each" if self.host else ""
        return f"memory on each device, estimated: {self.total / 1e9:.2f} GB ({told}){host}"


def estimate(
    model: Llava,
    *,
    stage: int,
    dtype: torch.dtype,
    tokens: int,
    supervised: int,
    images: int,
    shards: int = 0,
    shard_frozen: bool = False,
    optimizer: str = "adamw",
) -> Estimate:
    """What training ``model``, frozen as the stage has it and not yet shared out, takes on each device.

    Args:
        model: with ``decoder.checkpoint_activations`` as it will be.
        stage: 1 or 2.
        dtype: to compute in.
        tokens, supervised, images: of the fullest bin.
        shards: ranks that share one copy of the weights; 0 in one process without torchrun.
        shard_frozen: whether a frozen decoder is shared out.
        optimizer: as the recipe has it.
    """
    own = max(1, shards)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tower = sum(p.numel() for p in model.vision_tower.parameters())
    whole = frozen if stage == 1 and not shard_frozen else tower
    layer = sum(p.numel() for p in model.decoder.layers[0].parameters())
    root = model.decoder.embed_tokens.numel() * (2 if model.lm_head is not None else 1)
    size = dtype.itemsize
    sharded_layers = bool(shards) and (stage == 2 or shard_frozen)
    weights = whole * size + (frozen - whole) * size // own
    masters = trained * 4 // own
    if not shards:  # the masters stand beside the weights, unless these are float32
        weights += trained * size
        masters = 0 if size == 4 or optimizer == "adamw-offload" else masters
    packed = sum(m.nbytes for m in model.modules() if isinstance(m, Fp8Linear | Nf4Linear))
    return Estimate(
        weights=weights + packed,
        masters=masters,
        moments=int(trained * MOMENTS[optimizer]) // own,
        gradients=trained * 4 // own,
        gathered=(2 * layer + root) * size + (layer + root) * 4 * (stage == 2) if sharded_layers else 0,
        step=peak_of_step(
            model.config,
            stage=stage,
            dtype=dtype,
            checkpointing=model.decoder.checkpoint_activations,
            tokens=tokens,
            supervised=supervised,
            images=images,
            adapters=lora_of(model),
        ),
        host=trained * 16 // own if optimizer == "adamw-offload" else 0,  # masters, moments, gradients
    )


def peak_of_step(
    config: ModelConfig,
    *,
    stage: int,
    dtype: torch.dtype,
    checkpointing: str,
    tokens: int,
    supervised: int,
    images: int,
    adapters: LoraConfig | None = None,
) -> int:
    """Bytes beyond weights and their gradients, of a pass over one bin at its peak, with the Triton kernels."""

    def trial(layers: int) -> int:
        short = config.replace(text=dataclasses.replace(config.text, num_hidden_layers=layers))
        model = Llava(short, dtype=dtype, device="meta", seed=None)
        if adapters:
            attach(model, adapters)
        freeze(model, stage)
        model.decoder.checkpoint_activations = checkpointing
        for param in model.parameters():  # gradients go at once into sums that are counted apart
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(_drop)
        # In the place of the back end that would be chosen: without a device there is none to choose.
        model._attend_within = flash_of(short)  # type: ignore[method-assign, assignment]
        batch = bin_of(short, tokens, supervised, images).to("meta")
        with implementation("triton"), Live([*model.parameters(), *model.buffers()]) as live:
            model.loss(batch, denominator=1).backward()
        return live.peak

    few, more = trial(2), trial(4)
    return few + (more - few) // 2 * (config.text.num_hidden_layers - 2)


def _drop(param: Tensor) -> None:
    param.grad = None


def flash_of(config: ModelConfig) -> Callable[[PackedBatch], Attend]:
    """Attention that keeps what FlashAttention keeps: q, k, v, the result and a float32 sum a row and head."""

    def within(batch: PackedBatch) -> Attend:
        def attend(layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = turned(qkv, cos, sin, config.text.num_key_value_heads)
            return TRITON.attend(q, k, v, batch.seqlens, batch.cu_seqlens, True)

        return attend

    return within


def bin_of(config: ModelConfig, tokens: int, supervised: int, images: int) -> PackedBatch:
    """A bin of one sequence with these counts; which tokens they are does not matter."""
    image = images * config.tokens_per_image
    tokens = max(tokens, image + supervised)
    size = config.vision.image_size
    rows = torch.arange(tokens, dtype=torch.int32)
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        labels=torch.full((tokens,), IGNORE),
        position_ids=rows,
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        pixel_values=torch.zeros(images, 3, size, size),
        image_token_id=config.image_token_id,
        image_rows=rows[:image],
        text_rows=rows[image:],
        supervised_rows=rows[tokens - supervised :],
        max_seqlen=tokens,
        seqlens=(tokens,),
    )


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still in use; ``peak`` is the most at any time."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {id(t.untyped_storage()) for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


# ---- the command

MIXTURE = {1: (600, 24), 2: (800, 150)}  # tokens and supervised tokens for each picture: LLaVA-1.5's, about


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.train.memory",
        description="Estimate the memory that a training run takes of each device, in bfloat16.",
    )
    choices: dict[str, Any] = {f.name: f.metadata["choices"] for f in dataclasses.fields(Recipe)}
    parser.add_argument("--preset", choices=tuple(PRESETS), default="llava-1.5-7b", help="default %(default)s")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="default %(default)s")
    parser.add_argument(
        "--devices", type=int, default=1, help="that share one copy of the weights (default %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a bin (default %(default)s)")
    for name in ("activation_checkpointing", "optimizer"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, choices=choices[name], default=choices[name][0], help="default %(default)s")
    parser.add_argument("--shard-frozen", action="store_true", help="share the frozen decoder of stage 1 out")
    parser.add_argument("--lora-rank", type=int, default=0, help="of adapters in stage 2 (default %(default)s: none)")
    return parser


def of_preset(args: argparse.Namespace) -> Estimate:
    """The estimate of the command's arguments; bins hold text and pictures as LLaVA-1.5's data does on average.

    Raises:
        ConfigError: a number that cannot be.
    """
    if args.devices < 1 or args.max_tokens < 1:
        raise ConfigError(f"--devices {args.devices} and --max-tokens {args.max_tokens} must be at least 1")
    model = Llava(ModelConfig.preset(args.preset), device="meta", dtype=torch.bfloat16, seed=None)
    if args.lora_rank:
        attach(model, Recipe(stage=args.stage, lora_rank=args.lora_rank).lora())
    freeze(model, args.stage)
    model.decoder.checkpoint_activations = args.activation_checkpointing
    for_a_picture, supervised = MIXTURE[args.stage]
    return estimate(
        model,
        stage=args.stage,
        dtype=torch.bfloat16,
        tokens=args.max_tokens,
        supervised=args.max_tokens * supervised // for_a_picture,
        images=round(args.max_tokens / for_a_picture),
        shards=args.devices if args.devices > 1 else 0,
        shard_frozen=args.shard_frozen,
        optimizer=args.optimizer,
    )


def main(argv: list[str] | None = None) -> int:
    try:
        print(of_preset(build_parser().parse_args(argv)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
