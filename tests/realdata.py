"""Where tests find real data that does not belong to the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("LLAVA_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real_data(*parts: str) -> Path:
    """The path of a real data file or folder; skips the calling test where it is absent."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not at hand: {'/'.join(parts)} (set LLAVA_FAST_DATA to its folder)")
    return path
