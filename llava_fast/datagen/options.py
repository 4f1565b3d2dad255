"""The options of ``python -m llava_fast.datagen``, and what they come to."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llava_fast.datagen.built_in import scene_pictures
from llava_fast.datagen.coco import read_coco
from llava_fast.datagen.kinds import KINDS
from llava_fast.datagen.pictures import BOX_FORMS, Picture, read_pictures
from llava_fast.datagen.prompting import BUILT_IN
from llava_fast.errors import ConfigError

EPILOG = """\
examples:
  python -m llava_fast.datagen --scenes 3000 --rules --out runs/data
      the built-in teacher on the built-in scenes: no model and no network
  python -m llava_fast.datagen --coco-captions captions_train2017.json --coco-instances instances_train2017.json \\
      --count conversation=58000 detail=23000 reasoning=77000 --teacher-url http://localhost:8000/v1 \\
      --teacher-model MODEL --out runs/coco
  python -m llava_fast.datagen --pictures pictures.jsonl --dry-run 2
      print the prompts of two pictures and what the whole would take; ask nothing

other commands (each has --help):
  python -m llava_fast.datagen captions      stage-1 data from captions, with the paper's noun-phrase filter
  python -m llava_fast.datagen pictures      COCO's annotation files as one JSONL file
  python -m llava_fast.datagen statistics    a page about data files: counts, lengths, what is asked

--out is left with instruct.json (LLaVA JSON, for python -m llava_fast.train --data), the same by kind, rejected.jsonl,
summary.json, statistics.html and replies.jsonl: every answer that was paid for. The same command again goes on where a
run stopped and pays for nothing twice; other prompts, settings or models ask anew beside what is there.

exit code: 0 when every task has an answer, 1 when some have not, 2 when nothing could begin, 130 after Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.datagen",
        description="Instruction data from captions and boxes: a teacher that reads them, and sees no picture, writes "
        "conversations, detailed descriptions and reasoning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sources(parser.add_argument_group("pictures"))
    what = parser.add_argument_group("what is made")
    what.add_argument(
        "--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="kinds of data (default all three)"
    )
    what.add_argument(
        "--count", nargs="+", metavar="KIND=N", default=[], help="pictures to draw for a kind (default all there are)"
    )
    what.add_argument("--in-turn", action="store_true", help="one kind a picture, the kinds in turn")
    what.add_argument("--prompts", type=Path, default=BUILT_IN, help="folder of prompts (default: the built-in ones)")
    what.add_argument("--questions", type=Path, help="file of what a detailed description is asked for with")
    what.add_argument("--out", type=Path, default=Path("runs/datagen"), help="folder of the run (default %(default)s)")
    what.add_argument("--seed", type=int, default=0, help="of all that is drawn here (default %(default)s)")
    add_teacher(parser.add_argument_group("teacher"))
    parser.add_argument(
        "--dry-run", type=int, nargs="?", const=1, metavar="N", help="print the prompts of N pictures and stop"
    )
    return parser


def add_sources(group: argparse._ArgumentGroup) -> None:
    """Where pictures come from."""
    group.add_argument("--coco-captions", type=Path, metavar="JSON", help="COCO's captions_*.json")
    group.add_argument("--coco-instances", type=Path, metavar="JSON", help="COCO's instances_*.json, for the boxes")
    group.add_argument("--crowds", action="store_true", help="keep the boxes of groups (iscrowd)")
    group.add_argument(
        "--pictures", type=Path, metavar="FILE", help="JSON or JSONL of {'id', 'image', 'captions', 'instances'}"
    )
    group.add_argument(
        "--boxes", choices=BOX_FORMS, default="shares", help="of --pictures: shares, or pixels (default %(default)s)"
    )
    group.add_argument("--scenes", type=int, metavar="N", help="draw N built-in scenes")
    group.add_argument("--scene-seed", type=int, default=1, help="of the scenes (default %(default)s)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")


def add_teacher(group: argparse._ArgumentGroup) -> None:
    """Who answers, and how it is asked."""
    group.add_argument("--rules", action="store_true", help="the built-in teacher, for the built-in scenes")
    group.add_argument("--teacher-model", metavar="NAME", help="a model behind an OpenAI-compatible address")
    group.add_argument(
        "--teacher-url", metavar="URL", help="the address, such as http://localhost:8000/v1 (default OpenAI's own)"
    )
    group.add_argument(
        "--key-variable", default="OPENAI_API_KEY", help="environment variable with the key (default %(default)s)"
    )
    group.add_argument("--max-tokens", type=int, default=1024, help="of an answer (default %(default)s)")
    group.add_argument("--temperature", type=float, default=0.7, help="the paper names none (default %(default)s)")
    group.add_argument("--draws", type=int, default=2, help="tries to get an answer that is good (default %(default)s)")
    group.add_argument("--at-once", type=int, default=8, help="requests on their way at a time (default %(default)s)")
    group.add_argument("--per-minute", type=float, metavar="N", help="most requests begun in a minute")
    group.add_argument("--tries", type=int, default=8, help="of a request that fails (default %(default)s)")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds for a request (default %(default)s)")
    group.add_argument(
        "--pause",
        type=float,
        default=1.0,
        help="seconds before the second try, doubled each time (default %(default)s)",
    )
    group.add_argument(
        "--price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="dollars for a million tokens"
    )
    group.add_argument(
        "--budget", type=float, metavar="DOLLARS", help="stop when this run has spent that (needs --price)"
    )


def read_sources(args: argparse.Namespace) -> list[Picture]:
    """The pictures that the options name.

    Raises:
        ConfigError: none or several sources, or one that cannot be read.
    """
    given = [name for name in ("coco_captions", "pictures", "scenes") if getattr(args, name)]
    if len(given) != 1:
        raise ConfigError("give the pictures: --coco-captions JSON, or --pictures FILE, or --scenes N")
    if args.coco_captions:
        pictures = read_coco(args.coco_captions, args.coco_instances, crowds=args.crowds)
    elif args.pictures:
        pictures = list(read_pictures(args.pictures, args.boxes))
    else:
        pictures = scene_pictures(args.scenes, args.scene_seed)
    return pictures[: args.limit]


def counts_of(args: argparse.Namespace) -> dict[str, int]:
    """``--count`` as numbers.

    Raises:
        ConfigError: an entry that is no KIND=N.
    """
    counts = {}
    for entry in args.count:
        name, _, number = entry.partition("=")
        if name not in args.kinds or not number.isdecimal():
            raise ConfigError(f"--count {entry}: give KIND=N with a kind of --kinds ({', '.join(args.kinds)})")
        counts[name] = int(number)
    return counts


def check_teacher(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: no teacher, or two, or settings that do not fit together.
    """
    if args.budget and not any(args.price):
        raise ConfigError(f"--budget {args.budget} needs --price IN OUT, dollars for a million tokens")
    if args.rules and args.teacher_model:
        raise ConfigError("--rules and --teacher-model are two teachers; give one")
    if args.rules and not args.scenes:
        raise ConfigError("--rules knows the built-in scenes alone: add --scenes N, or give --teacher-model")
    if not args.rules and not args.teacher_model:
        raise ConfigError(
            "no teacher given. A model behind an OpenAI-compatible address: --teacher-model NAME --teacher-url URL. "
            "The built-in teacher, which needs none but knows the built-in scenes alone:\n"
            f"  python -m llava_fast.datagen --scenes {args.scenes or 3000} --rules --out {args.out}"
        )
    for name in ("max_tokens", "draws", "at_once"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")


def key_of(args: argparse.Namespace) -> str | None:
    return os.environ.get(args.key_variable) or None
