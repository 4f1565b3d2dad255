"""Stopping a run cleanly: Ctrl-C and SIGTERM are noted at once and obeyed between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop, has saved, and can be started again."""


@contextlib.contextmanager
def interrupts(asked: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set ``asked`` instead of breaking a step; a second Ctrl-C breaks at once.

    Outside the main thread, where handlers cannot be set, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
