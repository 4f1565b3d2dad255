"""llava-fast: the command lines of the package as subcommands."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llava_fast.datagen.__main__ import main as datagen
from llava_fast.evaluate.__main__ import main as evaluate
from llava_fast.generate.__main__ import main as generate
from llava_fast.round_trip import main as round_trip
from llava_fast.train.__main__ import main as train


def serve(argv: list[str] | None = None) -> int:
    from llava_fast.serve.__main__ import main as run  # its libraries are an extra's

    return run(argv)


COMMANDS: dict[str, Callable[[list[str] | None], int]] = {
    "train": train,
    "generate": generate,
    "serve": serve,
    "datagen": datagen,
    "evaluate": evaluate,
    "round-trip": round_trip,
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: llava-fast {{{','.join(COMMANDS)}}} ...\n       llava-fast COMMAND --help", file=sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
