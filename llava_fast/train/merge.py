"""python -m llava_fast.train.merge: a LoRA adapter added to the weights that it stands on, written as a whole model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from llava_fast.checkpoint.adapter import CONFIG, is_adapter
from llava_fast.checkpoint.load import FORMATS
from llava_fast.errors import CheckpointError, ConfigError, LlavaError
from llava_fast.pretrained import find_checkpoint, load, save

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_fast.train.merge", description=__doc__)
    parser.add_argument("adapter", help="directory or hub id: PEFT's format over transformers' LLaVA, or the authors'")
    parser.add_argument("--out", type=Path, required=True, help="new or empty directory for the merged model")
    parser.add_argument("--base", help="the weights below, when they are not where the adapter says")
    parser.add_argument("--vision-tower", help="the CLIP directory of an authors' adapter, likewise")
    parser.add_argument("--format", choices=FORMATS, default="hf", help="of what is written (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written (default the base's)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        adapter = find_checkpoint(args.adapter)
        if not is_adapter(adapter):
            raise CheckpointError(f"{adapter} holds no {CONFIG}; give the directory of a LoRA adapter")
        if args.out.exists() and any(args.out.iterdir()):
            raise ConfigError(f"--out {args.out} is not empty; give a new directory")
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model, processor = load(adapter, dtype=dtype, base=args.base, vision_tower=args.vision_tower)
        save(model, processor, args.out, format=args.format)
    except LlavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"merged {adapter} into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
