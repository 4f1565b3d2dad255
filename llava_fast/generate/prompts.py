"""The input: a JSONL file of prompts, read a line at a time and never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from llava_fast.errors import ConfigError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line as it stands in the file. Attributes: number: from 1; raw: its bytes."""

    number: int
    raw: bytes


@dataclass(frozen=True)
class Survey:
    """What one pass over the file tells.

    Attributes:
        prompts: lines that are not blank.
        lines: all of them.
        digest: of the file's bytes.
    """

    prompts: int
    lines: int
    digest: str


def survey(path: Path) -> Survey:
    """Count and hash the file.

    Raises:
        ConfigError: it cannot be read.
    """
    digest = blake2b(digest_size=16)
    prompts = lines = 0
    try:
        with path.open("rb") as file:
            for raw in file:
                digest.update(raw)
                lines += 1
                prompts += not raw.isspace()
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror}; give a JSONL file of prompts") from error
    return Survey(prompts, lines, digest.hexdigest())


def read(path: Path, is_done: Callable[[int], bool]) -> Iterator[Line]:
    """The lines that are still to be answered; blank ones are none."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.isspace() and not is_done(number):
                yield Line(number, raw.removeprefix(_BOM) if number == 1 else raw)
