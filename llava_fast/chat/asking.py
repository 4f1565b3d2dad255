"""One answer: a request streamed from the engine until it ends or Ctrl-C stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from llava_fast.engine import Completion, Engine, Request


@dataclass
class Answer:
    """Attributes:
    text: as far as it came, without white space at its ends.
    completion: of an answer that came to its end; None where Ctrl-C stopped it.
    """

    text: str = ""
    completion: Completion | None = None


def ask(engine: Engine, request: Request, show: Callable[[str], None], wait: Callable[[int], None]) -> Answer:
    """Run a request; Ctrl-C cancels it, and with it all that it holds in the engine.

    Args:
        engine: one with a thread of its own.
        request: for one answer.
        show: gets the text as it comes.
        wait: called once a second until the first text, with the seconds gone by.

    Raises:
        LlavaError: the request failed.
    """
    answer = Answer()
    # asyncio turns Ctrl-C into the cancellation of the coroutine: no exception can hit a lock half taken.
    with suppress(KeyboardInterrupt):
        asyncio.run(_stream(engine, request, answer, show, wait))
    answer.text = answer.text.strip()
    return answer


async def _stream(
    engine: Engine, request: Request, answer: Answer, show: Callable[[str], None], wait: Callable[[int], None]
) -> None:
    ticks = asyncio.ensure_future(_tick(wait))
    try:
        async with engine.submit(request) as handle:
            async for delta in handle:
                if delta.text:
                    ticks.cancel()
                    answer.text += delta.text
                    show(delta.text)
            answer.completion = await handle
    finally:
        ticks.cancel()


async def _tick(wait: Callable[[int], None]) -> None:
    seconds = 0
    while True:
        await asyncio.sleep(1)
        seconds += 1
        wait(seconds)
