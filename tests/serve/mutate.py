"""Breaks lines that the server's safety rests on, one at a time, and requires a test to notice.

    python -m tests.serve.mutate

The breaks are made in a temporary copy. Ends with 1 if a test passes all the same, or fails before anything is broken.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.kernels.mutate import Bench


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), "kernels", "llava_fast", "tests", "benches", "docs", module="llava_fast")
        survivors = list(bench.lines(Path(__file__).with_name("mutations.py")))
    print(f"{len(survivors)} not noticed" if survivors else "every break is noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
