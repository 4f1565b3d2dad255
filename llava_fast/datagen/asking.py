"""Asking: every task's question to the teacher, many at once, and again where an answer is rejected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from llava_fast.datagen.checks import Verdict, judge
from llava_fast.datagen.plan import Task
from llava_fast.datagen.prompting import Prompts
from llava_fast.teacher import Message, Reply, Teacher, TeacherError, TeacherUnusableError

FAILURES_IN_A_ROW = 25  # after that many the teacher is taken to be gone


@dataclass(frozen=True)
class How:
    """How a teacher is asked.

    Attributes:
        max_tokens: of an answer.
        draws: how often a task is asked while its answers are rejected.
        at_once: tasks that are worked on at a time.
    """

    max_tokens: int = 1024
    temperature: float = 0.7
    draws: int = 2
    at_once: int = 8


@dataclass(frozen=True)
class Failure:
    """A task without an answer. Attributes: why: the teacher's error."""

    task: Task
    why: str


async def ask_all(
    tasks: Iterable[Task],
    prompts: Prompts,
    teacher: Teacher,
    how: How,
    *,
    done: Callable[[Task, list[Verdict]], None],
    stop: threading.Event,
    patience: float = 30.0,
) -> list[Failure]:
    """Have the teacher answer every task; the answers stay with the teacher's file of replies.

    Args:
        done: told of every task that has ended, with its verdicts.
        stop: when set, nothing more is asked, and what is on its way has ``patience`` seconds to arrive.

    Returns:
        the tasks that have no answer.

    Raises:
        TeacherUnusableError: the teacher answers nothing, or has not for FAILURES_IN_A_ROW tasks.
        OSError: a reply could not be kept.
    """
    left, failures = iter(tasks), _Failures()
    workers = [
        asyncio.create_task(_work(left, prompts, teacher, how, done, stop, failures)) for _ in range(how.at_once)
    ]
    gathered = asyncio.gather(*workers)
    watch = asyncio.create_task(_cancel_after(stop, patience, workers))
    try:
        await gathered
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        watch.cancel()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, watch, return_exceptions=True)
    return failures.all


class _Failures:
    def __init__(self) -> None:
        self.all: list[Failure] = []
        self.in_a_row = 0

    def add(self, failure: Failure) -> None:
        self.all.append(failure)
        self.in_a_row += 1
        if self.in_a_row >= FAILURES_IN_A_ROW:
            raise TeacherUnusableError(
                f"the last {self.in_a_row} requests have failed, the latest: {failure.why}; the answers so far are "
                "kept. Start the same command again when the teacher is back"
            )


async def _work(
    left: Iterator[Task],
    prompts: Prompts,
    teacher: Teacher,
    how: How,
    done: Callable[[Task, list[Verdict]], None],
    stop: threading.Event,
    failures: _Failures,
) -> None:
    for task in left:
        if stop.is_set():
            return
        try:
            verdicts = await _ask(task, prompts, teacher, how, stop)
        except TeacherUnusableError:
            raise
        except TeacherError as error:
            failures.add(Failure(task, str(error)))
            done(task, [])
            continue
        failures.in_a_row = 0
        done(task, verdicts)


async def _ask(task: Task, prompts: Prompts, teacher: Teacher, how: How, stop: threading.Event) -> list[Verdict]:
    messages = prompts.messages(task.kind, task.picture)
    verdicts: list[Verdict] = []
    for draw in range(how.draws):
        reply = await teacher.ask(messages, max_tokens=how.max_tokens, temperature=how.temperature, draw=draw)
        verdicts.append(judge(task.kind, reply))
        if verdicts[-1].turns or stop.is_set():
            break
    return verdicts


async def _cancel_after(stop: threading.Event, patience: float, workers: list[asyncio.Task[None]]) -> None:
    while not stop.is_set():
        await asyncio.sleep(0.1)
    await asyncio.sleep(patience)
    for worker in workers:
        worker.cancel()


Recall = Callable[[list[Message], int], Reply | None]


def verdicts_of(task: Task, prompts: Prompts, recall: Recall, draws: int) -> Iterator[tuple[Reply, Verdict]]:
    """The answers that a task has been given, in order, up to the first good one.

    Args:
        recall: the reply to messages and draw, None where there is none.
    """
    messages = prompts.messages(task.kind, task.picture)
    for draw in range(draws):
        reply = recall(messages, draw)
        if reply is None:
            return
        verdict = judge(task.kind, reply)
        yield reply, verdict
        if verdict.turns:
            return
