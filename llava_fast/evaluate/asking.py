"""Asking a teacher many things at a time, each answer written to a journal as it comes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import Row
from llava_fast.evaluate.journal import Journal
from llava_fast.interrupt import Interrupted
from llava_fast.teacher import Message, Teacher, TeacherError, TeacherUnusableError

WAIT = 0.2  # seconds after which the loop looks whether it was asked to stop
HOPELESS = 3  # failures after which nobody is asked any more, when nothing has been answered


@dataclass(frozen=True)
class Question:
    """Attributes:
    key: by which the journal knows it.
    messages: what is asked.
    row: what the journal keeps beside the answer.
    draw: of those who ask the same several times, which one.
    """

    key: str
    messages: list[Message]
    row: Row = field(default_factory=dict)
    draw: int = 0


def ask_all(
    teacher: Teacher,
    questions: Iterable[Question],
    journal: Journal,
    *,
    max_tokens: int,
    temperature: float,
    at_once: int,
    stop: threading.Event,
    label: str,
) -> list[str]:
    """Ask what the journal does not hold yet; the answer stands under ``content``.

    Args:
        teacher: who is asked, in this one call: its connections are closed at the end.
        questions: all of them, with keys of their own.
        journal: where answers go.
        max_tokens, temperature: of every answer.
        at_once: questions under way at a time.
        stop: when set, no more is asked; what is under way is waited for and kept.
        label: of the progress bar.

    Returns:
        What went wrong, one text a question that has no answer.

    Raises:
        Interrupted: ``stop`` was set.
        TeacherUnusableError: the teacher will answer nothing.
    """
    left = [question for question in questions if question.key not in journal]
    if not left:
        return []

    async def ask(question: Question) -> None:
        text = await teacher.ask(question.messages, max_tokens=max_tokens, temperature=temperature, draw=question.draw)
        journal.write(question.key, {**question.row, "content": str(text)})

    async def work() -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            if isinstance(teacher, contextlib.AbstractAsyncContextManager):
                await stack.enter_async_context(teacher)  # its connections belong to this event loop
            return await _run(left, ask, at_once, stop, bar.update)

    with tqdm(total=len(left), desc=label, unit="question", dynamic_ncols=True) as bar:
        faults = asyncio.run(work())
    if stop.is_set():
        raise Interrupted(f"stopped; {journal.path} holds {len(journal.rows)} answers")
    return faults


async def _run(
    questions: list[Question],
    ask: Callable[[Question], Any],
    at_once: int,
    stop: threading.Event,
    done: Callable[[int], Any],
) -> list[str]:
    faults: list[str] = []
    answered = 0
    waiting = iter(questions)
    under_way: dict[asyncio.Task[None], Question] = {}
    try:
        while True:
            hopeless = not answered and len(faults) >= HOPELESS
            while len(under_way) < at_once and not stop.is_set() and not hopeless:
                question = next(waiting, None)
                if question is None:
                    break
                under_way[asyncio.ensure_future(ask(question))] = question
            if not under_way:
                return faults
            finished, _ = await asyncio.wait(under_way, timeout=WAIT, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                question = under_way.pop(task)
                try:
                    task.result()
                    answered += 1
                except TeacherUnusableError:
                    raise
                except TeacherError as error:
                    faults.append(f"{question.key}: {error}")
                done(1)
    finally:
        for task in under_way:
            task.cancel()


def ask_and_keep(
    args: argparse.Namespace,
    teacher: Teacher,
    questions: Sequence[Question],
    name: str,
    same: dict[str, Any],
    stop: threading.Event,
) -> dict[str, Row]:
    """Every question answered, through a journal in the folder of the run.

    Args:
        args: with the options of :mod:`~llava_fast.evaluate.teacher_options`, ``out`` and ``overwrite``.
        name: of the journal's file.
        same: what the answers depend on besides those options.

    Returns:
        The journal's row of each question, by its key.

    Raises:
        ConfigError: some questions have no answer.
    """
    same = {
        **same,
        "url": args.teacher_url,
        "temperature": args.teacher_temperature,
        "max_tokens": args.teacher_max_tokens,
    }
    with Journal(args.out / name, same, overwrite=args.overwrite) as journal:
        faults = ask_all(
            teacher,
            questions,
            journal,
            max_tokens=args.teacher_max_tokens,
            temperature=args.teacher_temperature,
            at_once=args.at_once,
            stop=stop,
            label=name.removesuffix(".jsonl"),
        )
        check_answered(faults, journal)
        return {question.key: journal.rows[question.key] for question in questions}


def check_answered(faults: list[str], journal: Journal) -> None:
    """
    Raises:
        ConfigError: some questions have no answer; names the first.
    """
    if faults:
        raise ConfigError(
            f"{len(faults)} questions got no answer, the first is {faults[0]}. {journal.path} keeps the other "
            f"{len(journal.rows)}; start the same command again to ask the rest"
        )
