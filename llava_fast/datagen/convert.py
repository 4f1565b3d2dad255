"""Pictures of any source as one JSONL file."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_fast.datagen.options import add_sources, read_sources
from llava_fast.datagen.pictures import as_row
from llava_fast.datagen.samples import LinesFile


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.datagen pictures",
        description="Write pictures with their captions and boxes as JSONL, boxes in shares of the picture.",
    )
    add_sources(parser.add_argument_group("pictures"))
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file")
    args = parser.parse_args(argv)
    with LinesFile(args.out) as file:
        for picture in read_sources(args):
            file.add(as_row(picture))
    print(f"{file.count:,} pictures in {args.out}")
    return 0
