"""python -m llava_fast.train: train a stage on your data, or run the built-in demonstration when nothing is given."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import typing
from pathlib import Path
from typing import Any

import torch

from llava_fast.checkpoint import join, load_projector
from llava_fast.checkpoint.adapter import is_adapter
from llava_fast.config import FEATURES, PRESETS, PROJECTORS, ModelConfig
from llava_fast.data.samples import load_samples
from llava_fast.errors import CheckpointError, ConfigError, LlavaError
from llava_fast.interrupt import Interrupted
from llava_fast.model import Llava, fp8, lora, nf4
from llava_fast.pretrained import load
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train import demo
from llava_fast.train.distributed import World, joined, place
from llava_fast.train.recipe import RECIPES, Recipe, recipe
from llava_fast.train.trainer import Trainer

EPILOG = """\
examples:
  python -m llava_fast.train
      the built-in demonstration: both stages on built-in pictures, held-out accuracy, a sheet of answers
  python -m llava_fast.train --recipe paper-stage1 --vision-tower CLIP_DIR --decoder VICUNA_DIR \\
      --data chat.json --images IMAGE_DIR --out runs/stage1
  python -m llava_fast.train --recipe paper-stage2 --vision-tower CLIP_DIR --decoder VICUNA_DIR \\
      --projector runs/stage1/projector.safetensors --data instruct.json --images IMAGE_DIR --out runs/stage2

The same command again goes on where the run stopped.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.train",
        description="Train LLaVA: stage 1 aligns the projector, stage 2 instructs projector and decoder. "
        "Without --data it runs the built-in demonstration.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start = parser.add_argument_group("what to start from")
    start.add_argument("--model", help="LLaVA directory or hub id: transformers' format or the authors'")
    start.add_argument("--vision-tower", help="CLIP directory; with --decoder, a fresh projector joins the two")
    start.add_argument("--decoder", help="LLaMA or Vicuna directory")
    start.add_argument("--preset", choices=tuple(PRESETS), help="random weights of these sizes (for trials)")
    start.add_argument("--tokenizer", help="tokenizer directory or file; default the decoder's own")
    start.add_argument("--projector", help="projector that stage 1 wrote (.safetensors or .bin)")
    start.add_argument(
        "--projector-type", choices=PROJECTORS, default="linear", help="of a fresh projector (default %(default)s)"
    )
    start.add_argument(
        "--select-layer",
        type=int,
        default=-2,
        help="hidden state of the tower that is the feature (default %(default)s)",
    )
    start.add_argument(
        "--select-feature",
        choices=FEATURES,
        default="patch",
        help="with or without the class token (default %(default)s)",
    )
    start.add_argument(
        "--image-aspect", choices=("square", "pad"), default=None, help="crop images, or pad them to a square"
    )
    data = parser.add_argument_group("data and output")
    data.add_argument("--data", nargs="+", type=Path, help="LLaVA JSON or JSONL file(s)")
    data.add_argument("--images", type=Path, help="folder that the samples' image paths start from")
    data.add_argument("--eval-data", nargs="+", type=Path, help="held-out samples whose loss is taken during the run")
    data.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default %(default)s)")
    data.add_argument("--fresh", action="store_true", help="delete what --out holds of an earlier run and start over")
    data.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="default: cuda when there is one, else cpu")
    machine.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="to compute in (default bfloat16 on cuda, float32 on a cpu)"
    )
    machine.add_argument("--attention", default="auto", help="attention implementation (default %(default)s)")
    add_recipe_options(parser)
    return parser


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """One option a field of Recipe; None means that the named recipe decides."""
    group = parser.add_argument_group("recipe", "a named recipe, and options that change it")
    group.add_argument(
        "--recipe", choices=tuple(RECIPES), default=None, help="named recipe (default paper-stage1, or --stage's)"
    )
    types = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (recipe default: {field.default})"
        if types[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        kind = next(t for t in (*typing.get_args(types[field.name]), types[field.name]) if t is not type(None))
        group.add_argument(flag, type=kind, choices=field.metadata["choices"], default=None, help=text)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except Interrupted as stopped:
        tell(f"{stopped}\nstart the same command again to go on")
        return 130
    except KeyboardInterrupt:
        print("\nstopped at once; the last checkpoint stands", file=sys.stderr)
        return 130
    except CheckpointError as error:
        tell(f"error: {error}", alone=True)
        return 1
    except LlavaError as error:
        tell(f"error: {error}")
        return 1
    except torch.OutOfMemoryError as error:
        tell(
            f"error: out of memory: {str(error).splitlines()[0]}\n"
            + "\n".join(
                getattr(error, "__notes__", ["the model itself does not fit: give --shard-frozen, or more devices"])
            ),
            alone=True,
        )
        return 1


def tell(message: str, alone: bool = False) -> None:
    """On the terminal. What all ranks meet alike rank 0 tells; what one may meet ``alone`` it tells with its name."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or alone:
        print(f"\n{message}" if rank == 0 else f"\n{place()}: {message}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with joined(device, args.shard_size) as (world, device):
        return run_in(args, world, device)


def run_in(args: argparse.Namespace, world: World, device: torch.device) -> int:
    if args.fresh:
        world.on_main(lambda: remove_run(args.out) if args.out.exists() else None)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.data is None:
        given = [
            name
            for name in ("model", "vision_tower", "decoder", "preset", "projector", "recipe", "stage")
            if getattr(args, name)
        ]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --data: LLaVA JSON to train on")
        if world.sharded:
            raise ConfigError("the demonstration runs in one process; start it without torchrun, or give --data")
        demo.run(args.out, device=device, dtype=dtype, seed=args.seed or 0, workers=args.workers)
        return 0
    chosen = choose_recipe(args)
    samples = load_samples(args.data, args.images)
    eval_samples = load_samples(args.eval_data, args.images) if args.eval_data else None
    model, processor = start_from(args, chosen, device, dtype)
    trainer = Trainer(
        model, processor, chosen, samples, args.out, eval_samples=eval_samples, wandb=args.wandb, world=world
    )
    summary = trainer.run()
    if not world.main:
        return 0
    print(
        f"loss {summary['first_loss']:.4f} -> {summary['final_loss']:.4f} in {summary['steps']} steps, "
        f"{summary['seconds']:.0f} s, {summary['supervised_tokens_per_s']:,.0f} supervised of "
        f"{summary['tokens_per_s']:,.0f} tokens/s\n{summary['result']}"
    )
    return 0


def choose_recipe(args: argparse.Namespace) -> Recipe:
    changes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if getattr(args, f.name) is not None}
    name = args.recipe or ("paper-stage2" if args.stage == 2 else "paper-stage1")
    if args.recipe and args.stage and RECIPES[name]["stage"] != args.stage:
        raise ConfigError(f"--recipe {name} is of stage {RECIPES[name]['stage']}, --stage says {args.stage}; give one")
    return recipe(name, **changes)


def start_from(
    args: argparse.Namespace, chosen: Recipe, device: torch.device, dtype: torch.dtype
) -> tuple[Llava, Processor]:
    """The model in the dtype to compute in, and its processor under the recipe's template."""
    joined = args.vision_tower and args.decoder
    if sum(map(bool, (args.model, joined, args.preset))) != 1:
        raise ConfigError("give one start: --model DIR, or --vision-tower DIR with --decoder DIR, or --preset NAME")
    if chosen.lora_bits:
        nf4.check_available(device)
    if chosen.fp8_frozen:
        fp8.check_frozen(device, dtype)
    if chosen.fp8:
        fp8.check_trained(device, dtype)
    if chosen.lora_rank and args.preset:
        raise ConfigError(
            "LoRA needs weights on disk for its adapters to name: --model, or --vision-tower and --decoder"
        )
    if chosen.lora_rank and args.model and is_adapter(Path(args.model)):
        raise ConfigError(
            f"--model {args.model} is an adapter, and new ones cannot stand on it; merge it first: "
            f"python -m llava_fast.train.merge {args.model} --out DIR"
        )
    # What is to be rounded to 4 bits is read into the host's memory first.
    made_on = torch.device("cpu") if chosen.lora_bits else device
    make: dict[str, Any] = {"device": made_on, "dtype": dtype, "attention": args.attention}
    if args.model:
        model, processor = load(args.model, vision_tower=args.vision_tower, base=args.decoder, **make)
        tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else processor.tokenizer
    else:
        tokenizer = Tokenizer.load(args.tokenizer or args.decoder)
        shape = {
            "projector": args.projector_type,
            "select_layer": args.select_layer,
            "select_feature": args.select_feature,
        }
        if joined:
            model = join(args.vision_tower, args.decoder, seed=chosen.seed, **shape, **make)
        else:
            model = Llava(preset_for(args.preset, tokenizer, shape), seed=chosen.seed, **make)
    if args.projector:
        load_projector(model, args.projector)
    if chosen.lora_bits:
        nf4.quantize_base(model, device)
    if chosen.lora_rank:
        lora.attach(model, chosen.lora(**stands_on(args)), seed=chosen.seed)
    if chosen.fp8_frozen:
        fp8.freeze_decoder(model)
    if chosen.fp8:
        fp8.train_decoder(model)
    changes = {"template": chosen.template or model.config.template}
    if args.image_aspect:
        changes["image_aspect"] = args.image_aspect
    model.config = model.config.replace(**changes)
    prepared = Processor.from_config(model.config, tokenizer)
    prepared.max_length = chosen.max_length
    if args.model and not args.image_aspect:
        prepared.image = processor.image  # as the checkpoint's own preprocessor_config.json has it
    return model, prepared


def stands_on(args: argparse.Namespace) -> dict[str, str | None]:
    """The weights that adapters name: local directories in full, so that they are found from anywhere."""

    def named(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and Path(path).is_dir() else path

    if args.model:
        return {"base": named(args.model), "vision_tower": named(args.vision_tower)}
    return {"base": named(args.decoder), "vision_tower": named(args.vision_tower)}


def preset_for(name: str, tokenizer: Any, shape: dict[str, Any]) -> ModelConfig:
    """The preset's sizes with the vocabulary of ``tokenizer``."""
    config = ModelConfig.preset(name)
    text = dataclasses.replace(
        config.text,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
    )
    image = tokenizer.token_id("<image>")
    return config.replace(
        text=text, **({"image_token_id": -200} if image is None else {"image_token_id": image}), **shape
    )


def remove_run(folder: Path) -> None:
    """Delete the run in ``folder``: only what a run writes, and only where a run has been."""
    stages = [folder / "stage1", folder / "stage2", folder]
    if not any((s / "run.json").exists() for s in stages):
        raise ConfigError(f"--fresh: {folder} holds no run; give an empty or new folder as --out")
    for stage in stages:
        for name in ("run.json", "metrics.jsonl", "summary.json", "loss.png", "projector.safetensors", "answers.png"):
            (stage / name).unlink(missing_ok=True)
        for name in ("checkpoints", "tensorboard", "model", "adapter"):
            shutil.rmtree(stage / name, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
