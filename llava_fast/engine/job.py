"""Job: a request inside the engine. Its handle is the caller's side of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava_fast.engine.handle import Handle
from llava_fast.engine.request import Request
from llava_fast.engine.sequence import Sequence


@dataclass(eq=False)
class Job:
    """Attributes:
    number: in order of arrival.
    submitted: seconds on the monotonic clock.
    sequences: its answers that are not finished; only the first until the prompt is computed, and the others in forks.
    started: something of it was computed; answered: it has a token; ended: nothing more will come.
    """

    request: Request
    handle: Handle
    number: int
    submitted: float
    sequences: list[Sequence] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)
    started: bool = False
    answered: bool = False
    ended: bool = False
