"""Breaks lines that the server's safety rests on, one at a time, and requires a test to notice.

    python -m tests.serve.mutate               all of tests/serve/mutations.py
    python -m tests.serve.mutate --only WORD   those with WORD in file, broken line or test

The breaks are made in a temporary copy. Ends with 1 if a test passes all the same, or fails before anything is broken.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.kernels.mutate import try_list

if __name__ == "__main__":
    sys.exit(try_list(Path(__file__).with_name("mutations.py"), "kernels", "llava_fast", "tests", "benches", "docs"))
