"""llava-fast: the command lines of the package as subcommands."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {  # imported when asked for: one command's packages are not needed by another
    "train": "llava_fast.train.__main__",
    "generate": "llava_fast.generate.__main__",
    "serve": "llava_fast.serve.__main__",
    "chat": "llava_fast.chat.__main__",
    "datagen": "llava_fast.datagen.__main__",
    "evaluate": "llava_fast.evaluate.__main__",
    "round-trip": "llava_fast.round_trip",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: llava-fast {{{','.join(COMMANDS)}}} ...\n       llava-fast COMMAND --help", file=sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
