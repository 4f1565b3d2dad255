"""InFlight: the lines that an engine of this process is answering, as many as it takes to keep it busy."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Event
from typing import Any

from llava_fast.engine import Engine, Handle
from llava_fast.errors import EngineClosedError, InvalidRequestError, LlavaError
from llava_fast.generate.answers import Answer, answer_of, failure_of
from llava_fast.generate.prompts import Line
from llava_fast.generate.requests import id_of, parse
from llava_fast.generate.setup import Setup


@dataclass
class _Waiting:
    number: int
    row_id: Any
    handle: Handle


class InFlight:
    """Args: setup: how lines become requests; engine: one with a thread of its own. Closing closes the engine."""

    def __init__(self, setup: Setup, engine: Engine):
        self._setup, self._engine = setup, engine
        self.faults: list[str] = []  # always empty: what happens to an engine of this process is raised
        self._waiting: list[_Waiting] = []  # oldest first
        self._ended = Event()  # an answer has been finished since the last look
        self._failed: list[Answer] = []  # lines that did not get as far as the engine

    def __len__(self) -> int:
        return len(self._waiting) + len(self._failed)

    @property
    def full(self) -> bool:
        return len(self) >= self._setup.in_flight

    def add(self, line: Line) -> None:
        """Send a line to the engine. What is wrong with the line is its answer.

        Raises:
            EngineClosedError: the engine has stopped.
        """
        row: dict[str, Any] = {}
        try:
            row = parse(line)
            request = self._setup.request(row, line.number)
        except InvalidRequestError as error:
            self._failed.append(failure_of(line.number, id_of(row, line.number), error))
            return
        handle = self._engine.submit(request)
        self._waiting.append(_Waiting(line.number, id_of(row, line.number), handle))
        handle.add_done_callback(lambda _: self._ended.set())

    def collect(self, seconds: float) -> list[Answer]:
        """The answers that are there, after a wait of at most ``seconds`` for one.

        Raises:
            EngineClosedError: the engine has stopped; the lines that it held have no answer.
        """
        answers, self._failed = self._failed, []
        if self._waiting and not answers:
            self._ended.wait(seconds)
        self._ended.clear()
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if one.handle.done:
                answers.append(self._answer(one))
            else:
                self._waiting.append(one)
        return answers

    def _answer(self, one: _Waiting) -> Answer:
        try:
            return answer_of(one.number, one.row_id, one.handle.result())
        except EngineClosedError:
            raise
        except LlavaError as error:
            return failure_of(one.number, one.row_id, error)

    def close(self) -> None:
        self._engine.close()
