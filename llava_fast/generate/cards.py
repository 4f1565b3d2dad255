"""Cards: one process a card, each with an engine; this process hands out lines and gathers answers.

Lines go to whichever process has the fewest. A process that dies takes the lines it held with it: they get no answer,
are told in ``faults``, and are done when the command is started again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from queue import Empty, SimpleQueue
from typing import Any

import torch

from llava_fast.errors import EngineClosedError
from llava_fast.generate.answers import Answer
from llava_fast.generate.batches import WAIT
from llava_fast.generate.in_flight import InFlight
from llava_fast.generate.prompts import Line
from llava_fast.generate.setup import Setup

READY = "ready"


class Cards:
    """Args:
    setup: how each process answers lines.
    devices: one process for each, such as ``["cuda:0", "cuda:1"]``.
    stop: when set, the start is given up with KeyboardInterrupt.

    Attributes:
        faults: what happened to processes that died, and which lines they held.

    Raises:
        EngineClosedError: a process could not start; says why.
    """

    def __init__(self, setup: Setup, devices: list[str], stop: threading.Event | None = None):
        self._setup = setup
        self.faults: list[str] = []
        self._cards: list[_Card] = []
        try:
            with _deaf_to_interrupts():
                for device in devices:
                    self._cards.append(_Card(setup, device, len(devices)))
            self._wait_until_ready(stop or threading.Event())
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return sum(len(card.held) for card in self._cards)

    @property
    def full(self) -> bool:
        return all(len(card.held) >= self._setup.in_flight for card in self._cards)

    def add(self, line: Line) -> None:
        """Hand a line to the process that has the fewest.

        Raises:
            EngineClosedError: no process is left.
        """
        while True:
            card = min(self._living(), key=lambda card: len(card.held))
            try:
                card.connection.send(line)
            except OSError:
                self._bury(card, "")
                continue
            card.held.add(line.number)
            return

    def collect(self, seconds: float) -> list[Answer]:
        """The answers that are there, after a wait of at most ``seconds``.

        Raises:
            EngineClosedError: no process is left.
        """
        answers: list[Answer] = []
        by_connection: dict[Any, _Card] = {card.connection: card for card in self._living()}
        for connection in wait(list(by_connection), seconds):
            card = by_connection[connection]
            try:
                found = card.connection.recv()
            except (EOFError, OSError):
                self._bury(card, "")
                continue
            if isinstance(found, str):
                self._bury(card, found)
                continue
            card.held.difference_update(answer["line"] for answer in found)
            answers += found
        return answers

    def close(self) -> None:
        """End every process; lines that they hold get no answer."""
        for card in self._cards:
            card.connection.close()  # its end of input
        for card in self._cards:
            card.end()
        self._cards = []

    def _living(self) -> list[_Card]:
        if not self._cards:
            raise EngineClosedError("every process has died")
        return self._cards

    def _wait_until_ready(self, stop: threading.Event) -> None:
        for card in self._cards:
            while not card.connection.poll(WAIT):
                if stop.is_set():
                    raise KeyboardInterrupt
            try:
                message = card.connection.recv()
            except (EOFError, OSError):
                message = card.exit()
            if message != READY:
                raise EngineClosedError(f"the process of {card.device} could not start: {message}")

    def _bury(self, card: _Card, why: str) -> None:
        self._cards.remove(card)
        card.connection.close()
        lines = sorted(card.held)
        some = ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
        held = f"; unanswered are its {len(lines)} lines {some}" if lines else "; no line was lost"
        self.faults.append(f"the process of {card.device} died ({why or card.exit()}){held}")
        card.end()


class _Card:
    """One process, and the numbers of the lines that it holds."""

    def __init__(self, setup: Setup, device: str, processes: int):
        self.device = device
        self.held: set[int] = set()
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(setup, device, processes, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def exit(self) -> str:
        """How the process ended."""
        self.process.join(5)
        code = self.process.exitcode
        return f"by signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def end(self) -> None:
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which a terminal sends to all: this process ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---- in the process of a card


def _work(setup: Setup, device: str, processes: int, connection: Connection) -> None:
    """Answer lines until the connection is closed at its other end, for whatever reason."""
    try:
        if torch.device(device).type == "cpu":
            torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // processes)))
        with setup.open(device) as engine:
            connection.send(READY)
            _serve(InFlight(setup, engine), connection)
    except (BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _serve(pool: InFlight, connection: Connection) -> None:
    inbox: SimpleQueue[Line | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    while _take(inbox, pool):
        answers = pool.collect(WAIT)
        if answers:
            connection.send(answers)


def _take(inbox: SimpleQueue[Line | None], pool: InFlight) -> bool:
    """Add the lines that have come, waiting for one where there is nothing else to do; False at the end."""
    with suppress(Empty):
        while True:
            line = inbox.get(block=not len(pool))
            if line is None:
                return False
            pool.add(line)
    return True


def _listen(connection: Connection, inbox: SimpleQueue[Line | None]) -> None:
    """Read all the time, so that the other side is never held up while this one computes or sends."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(None)
