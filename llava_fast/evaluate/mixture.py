"""python -m llava_fast.evaluate mixture: shares of several data files as one, as for the paper's Table 4."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from random import Random
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import Row, check_writable, read_rows, write_whole


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "mixture",
        help="shares of several data files as one training file",
        description="Draw a share of each LLaVA JSON file and write all of them as one. What is drawn follows from the "
        "seed, and each file's samples stay in their order; training shuffles them.",
        epilog="example: python -m llava_fast.evaluate mixture --out mix.json conversation_58k.json "
        "detail_23k.json:0.05 complex_reasoning_77k.json:0.10",
    )
    parser.set_defaults(run=run)
    parser.add_argument("parts", nargs="+", metavar="FILE[:SHARE]", help="share from 0 to 1; default 1, all of it")
    parser.add_argument("--out", type=Path, required=True, help="LLaVA JSON file to write")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    check_writable(args.out, "--out")
    mixed: list[Row] = []
    for part in args.parts:
        path, share = part_of(part)
        rows = read_rows(path, ("conversations",))
        taken = draw(rows, share, f"{args.seed}/{path.name}")
        print(f"{path}: {len(taken)} of {len(rows)}")
        mixed += taken
    write_whole(args.out, json.dumps(mixed, ensure_ascii=False, indent=1) + "\n")
    print(f"{args.out}: {len(mixed)} samples")
    return 0


def part_of(text: str) -> tuple[Path, float]:
    """("detail.json", 0.05) from "detail.json:0.05".

    Raises:
        ConfigError: the share is no number from 0 to 1.
    """
    name, colon, share = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{text!r} must be FILE or FILE:SHARE with a share from 0 to 1, such as detail.json:0.05")
    return Path(name), value


def draw(rows: list[Row], share: float, seed: str) -> list[Row]:
    """``share`` of the rows, to the nearest whole number, in their order."""
    chosen = Random(seed).sample(range(len(rows)), round(share * len(rows)))
    return [rows[index] for index in sorted(chosen)]
