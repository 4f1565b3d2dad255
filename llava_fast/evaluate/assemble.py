"""python -m llava_fast.evaluate assemble: the model after stage 1 as a checkpoint, so that it can be measured."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import torch

from llava_fast.checkpoint import join
from llava_fast.config import PROJECTORS
from llava_fast.pretrained import save
from llava_fast.processor import Processor, Tokenizer
from llava_fast.processor.conversation import TEMPLATES


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "assemble",
        help="the model after stage 1 as a checkpoint",
        description="Join a CLIP directory, a LLaMA or Vicuna directory and the projector that stage 1 wrote into a "
        "LLaVA checkpoint: the row without instruction tuning of the paper's Table 4.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--vision-tower", type=Path, required=True, help="CLIP directory")
    parser.add_argument("--decoder", type=Path, required=True, help="LLaMA or Vicuna directory")
    parser.add_argument("--projector", type=Path, required=True, help="projector.safetensors or mm_projector.bin")
    parser.add_argument("--template", choices=tuple(TEMPLATES), default="v1", help="default %(default)s")
    parser.add_argument("--select-layer", type=int, default=-2, help="of the tower (default %(default)s)")
    parser.add_argument("--projector-type", choices=PROJECTORS, default="linear", help="default %(default)s")
    parser.add_argument("--image-aspect", choices=("square", "pad"), default="square", help="default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="to write")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")


def run(args: argparse.Namespace, stop: threading.Event) -> int:

    model = join(
        args.vision_tower,
        args.decoder,
        projector=args.projector_type,
        select_layer=args.select_layer,
        image_aspect=args.image_aspect,
        template=args.template,
        dtype=getattr(torch, args.dtype),
        projector_weights=args.projector,
    )
    save(model, Processor.from_config(model.config, Tokenizer.load(args.decoder)), args.out)
    print(args.out)
    return 0
