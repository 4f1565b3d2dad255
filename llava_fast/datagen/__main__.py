"""python -m llava_fast.datagen: training data from captions, boxes and a language-only teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llava_fast.datagen import captions, convert, instruct, statistics
from llava_fast.errors import LlavaError

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "instruct": instruct.main,
    "captions": captions.main,
    "pictures": convert.main,
    "statistics": statistics.main,
}
NOT_BEGUN = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; without a name it is ``instruct``."""
    arguments = sys.argv[1:] if argv is None else argv
    name, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in COMMANDS else ("instruct", arguments)
    try:
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        print("\nstopped at once; what was answered is kept. Start the same command again to go on", file=sys.stderr)
        return instruct.INTERRUPTED
    except LlavaError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return NOT_BEGUN


if __name__ == "__main__":
    sys.exit(main())
