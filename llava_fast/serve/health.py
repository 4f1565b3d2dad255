"""Health: whether the engine makes tokens now."""

from __future__ import annotations

import asyncio
import time

from llava_fast.engine import Engine, Request, SamplingParams
from llava_fast.errors import DeadlineError, EngineClosedError, LlavaError, QueueFullError
from llava_fast.serve.settings import Settings

_FIRST = -(1 << 63)  # before every client's request


class Health:
    """One verdict at a time, remembered for ``health_age_seconds``: asking often costs nothing."""

    def __init__(self, engine: Engine, settings: Settings):
        self._engine, self._settings = engine, settings
        tokenizer = engine.processor.tokenizer
        self._prompt = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
        self._checked, self._verdict = -1e9, ""
        self._checking: asyncio.Task[None] | None = None

    async def check(self) -> str:
        """Empty where all is well, else what is wrong. Within ``health_seconds``, however busy the engine is."""
        if self._engine.failed is not None:
            return "the engine has stopped"
        if time.monotonic() - self._checked > self._settings.health_age_seconds:
            if self._checking is None or self._checking.done():
                self._checking = asyncio.create_task(self._check())
            await asyncio.shield(self._checking)  # others wait for it too
        return self._verdict

    async def _check(self) -> None:
        seconds = self._settings.health_seconds
        before = self._engine.stats().generated_tokens
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        request = Request(
            token_ids=self._prompt, sampling=sampling, priority=_FIRST, timeout=seconds, request_id="health"
        )
        try:
            async with asyncio.timeout(seconds + 0.5):  # the engine's own timeout needs a step that ends
                async with self._engine.submit(request) as handle:
                    await handle
            self._verdict = ""
        except (TimeoutError, DeadlineError):  # all places taken by long answers, or stuck
            busy = self._engine.stats().generated_tokens > before
            self._verdict = "" if busy else f"the engine made no token in {seconds:g} seconds"
        except QueueFullError:
            await asyncio.sleep(min(1.0, seconds))
            busy = self._engine.stats().generated_tokens > before
            self._verdict = "" if busy else "the engine's queue is full and no token is made"
        except EngineClosedError:
            self._verdict = "the engine is closed"
        except LlavaError:
            self._verdict = "the engine cannot make a token"
        self._checked = time.monotonic()
