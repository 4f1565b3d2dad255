"""The loop: lines in as long as there is room, answers out as they are finished."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from llava_fast.generate.answers import Answer
from llava_fast.generate.prompts import Line

WAIT = 0.05  # seconds after which the loop looks up, whether or not an answer came


class Pool(Protocol):
    """What answers lines: an engine of this process, or several processes.

    Attributes:
        faults: what went wrong beyond single lines; whoever tells of a fault takes it out.
    """

    faults: list[str]

    def __len__(self) -> int:
        """Lines added whose answers were not collected."""

    @property
    def full(self) -> bool:
        """Whether there is enough to do, so that no line should be added."""

    def add(self, line: Line) -> None: ...

    def collect(self, seconds: float) -> list[Answer]:
        """The answers that are there, after a wait of at most ``seconds``."""

    def close(self) -> None: ...


def batches(lines: Iterable[Line], pool: Pool) -> Iterator[list[Answer]]:
    """Answers in the order in which they are finished; an empty list where none came within ``WAIT``."""
    for line in lines:
        while pool.full:
            yield pool.collect(WAIT)
        pool.add(line)
    while len(pool):
        yield pool.collect(WAIT)
