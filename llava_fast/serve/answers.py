"""Answers on their way out: whole or as server-sent events, and given up when nobody is there to read them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava_fast.engine import Completion, Delta, Handle
from llava_fast.errors import LlavaError
from llava_fast.serve import problems
from llava_fast.serve.forms import Form, usage_of
from llava_fast.serve.gate import Gate, Visit
from llava_fast.serve.problems import ApiError

log = logging.getLogger("llava_fast.serve")

Found = TypeVar("Found")
Finished = Callable[[list[Completion]], Any]
_UNSLOWED = 8  # requests whose streams keep their pace
_SLOWEST = 0.1  # seconds between two events: text still flows for who reads it
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def while_there(receive: Receive, work: Awaitable[Found]) -> Found:
    """What ``work`` comes to, which is given up when the client leaves before. The body must have been read.

    Raises:
        ClientDisconnect: nobody is there any more.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


async def _left(receive: Receive) -> None:
    """Returns once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer(Response):
    """Runs the requests of one body to their end. If the client leaves before, they are cancelled.

    Args:
        handles: one for each prompt.
        form: how the answers are written.
        stream: as server-sent events; ``include_usage``: with a last one that counts tokens.
        send_seconds: how long a client may take to read what was sent.
        event_seconds: at least so long between two events of a stream; longer with many requests.
        finished: called with the completions at the end of an answer that came to its end.
    """

    def __init__(
        self,
        handles: list[Handle],
        form: Form,
        *,
        stream: bool,
        include_usage: bool,
        send_seconds: float,
        event_seconds: float,
        gate: Gate,
        finished: Finished,
    ):
        super().__init__()
        self._handles, self._form = handles, form
        self._stream, self._include_usage = stream, include_usage
        self._send_seconds, self._event_seconds = send_seconds, event_seconds
        self._gate, self._finished = gate, finished
        self._left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(self._watch(receive))
        self._gate.handles.update(self._handles)

        async def patient(body: bytes, more: bool) -> None:
            try:
                async with asyncio.timeout(self._send_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                self._left = True
                raise ConnectionError("the client does not read its answer") from None

        try:
            await (self._in_chunks if self._stream else self._as_one)(scope["visit"], send, patient)
        except LlavaError as error:
            if not self._left:
                raise self._problem(error, scope["visit"]) from error
        finally:
            watching.cancel()
            for handle in self._handles:
                handle.cancel()
            self._gate.handles.difference_update(self._handles)

    async def _watch(self, receive: Receive) -> None:
        await _left(receive)
        self._left = True
        for handle in self._handles:
            handle.cancel()

    def _problem(self, error: LlavaError, visit: Visit) -> ApiError:
        known = problems.of_engine(error)
        if known is None:
            log.error("request %s failed", visit.request_id, exc_info=error)
        return known or problems.internal(visit.request_id)

    async def _as_one(self, visit: Visit, send: Send, patient: Any) -> None:
        completions = [await handle for handle in self._handles]
        body = _json(self._form.whole(completions))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._end(visit, completions)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await patient(body, False)

    async def _in_chunks(self, visit: Visit, send: Send, patient: Any) -> None:
        usage = {"usage": None} if self._include_usage else {}
        begun: set[int] = set()
        answers = len(self._handles[0]._completion.outputs)
        deltas = self._deltas()
        try:
            async for found in deltas:
                if not begun:  # the first token decides the status: until then an error is an HTTP error
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
                events = b""
                for prompt, delta in found:
                    index = prompt * answers + delta.index
                    if index not in begun:
                        begun.add(index)
                        opening = self._form.opening(prompt)
                        if opening is not None:
                            events += _event(self._form.chunk([{"index": index, **opening}], **usage))
                    if delta.text or delta.finish_reason or delta.logprobs:
                        events += _event(self._form.chunk([self._form.piece(index, delta)], **usage))
                if events:
                    await patient(events, True)
        except LlavaError as error:
            if not begun or self._left:
                raise
            await patient(_event(self._problem(error, visit).body), False)
            return
        completions = [await handle for handle in self._handles]
        last = _event(self._form.chunk([], usage=usage_of(completions))) if self._include_usage else b""
        await self._end(visit, completions)
        await patient(last + b"data: [DONE]\n\n", False)

    async def _deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What is new in the answers, all of a prompt's at once, with the number of the prompt."""
        if len(self._handles) == 1:
            async for deltas in self._paced(self._handles[0]):
                yield [(0, delta) for delta in deltas]
            return
        queue: asyncio.Queue[tuple[int, list[Delta] | LlavaError]] = asyncio.Queue()

        async def follow(prompt: int, handle: Handle) -> None:
            try:
                async for deltas in self._paced(handle):
                    queue.put_nowait((prompt, deltas))
                queue.put_nowait((prompt, []))
            except LlavaError as error:
                queue.put_nowait((prompt, error))

        tasks = [asyncio.create_task(follow(*one)) for one in enumerate(self._handles)]
        try:
            left = len(tasks)
            while left:
                prompt, found = await queue.get()
                if isinstance(found, LlavaError):
                    raise found
                left -= not found
                if found:
                    yield [(prompt, delta) for delta in found]
        finally:
            for task in tasks:
                task.cancel()

    async def _paced(self, handle: Handle) -> AsyncIterator[list[Delta]]:
        """What is new whenever the time between two events has gone by, and at the end."""
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        handle.add_done_callback(lambda _: _tell(loop, ended))
        async for delta in handle:
            yield [delta, *handle.take()]
            if self._event_seconds and not handle.done:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await ended.wait()

    def _pause(self) -> float:
        """Seconds to the next event. The more requests there are, the longer: the loop's work does not grow with them
        until the longest is reached."""
        crowd = len(self._gate.handles) / _UNSLOWED
        return max(self._event_seconds, min(_SLOWEST, self._event_seconds * crowd))

    async def _end(self, visit: Visit, completions: list[Completion]) -> None:
        usage = usage_of(completions)
        visit.notes |= {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "stream": self._stream,
        }
        first = [c.first_token_s for c in completions if c.first_token_s is not None]
        if first:
            visit.notes["first_token_ms"] = round(1000 * min(first), 1)
        for completion in completions:
            self._gate.metrics.completed(completion)
        await self._finished(completions)


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop was closed: nobody waits any more
        loop.call_soon_threadsafe(event.set)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _event(value: Any) -> bytes:
    return b"data: " + _json(value) + b"\n\n"
