"""python -m llava_fast.evaluate: measure a model, or score answers and reviews that exist already."""

from __future__ import annotations

import argparse
import sys
import threading

import torch

from llava_fast.errors import LlavaError
from llava_fast.evaluate import assemble, compare, llava_bench, mixture, pope, recipes, scienceqa
from llava_fast.interrupt import Interrupted, interrupts

COMMANDS = (llava_bench, scienceqa, pope, compare, mixture, assemble, recipes)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.evaluate",
        description="Measure a model as section 5 of the paper does, or score answers and reviews that exist already.",
        epilog="Each has a --help of its own. Exit code: 0 done, 1 not done, 130 after Ctrl-C; the same command again "
        "goes on where a run stopped.",
    )
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    args.argv = argv
    stop = threading.Event()
    try:
        with interrupts(stop):
            return args.run(args, stop)
    except Interrupted as stopped:
        print(f"\n{stopped}\nstart the same command again to go on", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nstopped at once; what was written stands. Start the same command again to go on", file=sys.stderr)
        return 130
    except (LlavaError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"\nerror: out of memory: {str(error).splitlines()[0]}\nlower --kv-cache-bytes", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
