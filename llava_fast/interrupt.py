"""Stopping a run cleanly: Ctrl-C and SIGTERM are noted at once and obeyed between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can be started again."""


@contextlib.contextmanager
def interrupts(asked: threading.Event, patience: float = 0.0) -> Iterator[None]:
    """Ctrl-C and SIGTERM set ``asked`` instead of breaking a step; a second Ctrl-C breaks at once.

    Under a launcher such as torchrun or srun one Ctrl-C or SIGTERM can arrive twice, from the launcher and from the
    system; ``patience`` is the number of seconds within which a second one counts as the same.

    Outside the main thread, where handlers cannot be set, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first = 0.0

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        if not asked.is_set():
            first = time.monotonic()
        elif time.monotonic() - first >= patience:
            raise KeyboardInterrupt
        asked.set()

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
