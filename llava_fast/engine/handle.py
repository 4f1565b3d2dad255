"""Handle: what ``submit`` returns. Read from any thread or any event loop; written by the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from threading import Condition, RLock

from llava_fast.engine.prompt import Prompt
from llava_fast.engine.request import Completion, Delta, Output, TokenLogprob
from llava_fast.engine.text import TextStream
from llava_fast.errors import CancelledError

Waiting = tuple[asyncio.AbstractEventLoop, asyncio.Event]


class Handle:
    """A submitted request.

    Iterate over it (``for`` or ``async for``) for the deltas as they come, each with all that is new in an answer; ask
    for the whole with :meth:`result` or ``await handle``, stop it with :meth:`cancel`. As a context manager (``with``
    or ``async with``) it is cancelled on the way out if it is not done by then. One reader iterates; any number may
    wait for the result.
    """

    def __init__(self, request_id: str, n: int, drive: Callable[[], None] | None):
        self.request_id = request_id
        self._completion = Completion(request_id, [Output(index) for index in range(n)])
        self._cancel: Callable[[], None] = _nothing
        self._drive = drive  # without a thread of the engine's own, who waits works
        self._lock = RLock()  # a signal may cancel while its thread is inside
        self._news_came, self._ended = Condition(self._lock), Condition(self._lock)
        self._asleep = 0  # threads that wait for news; who waits for the end is not woken by every token
        self._texts: list[TextStream] = []  # of each answer
        self._given = [(0, 0)] * n  # tokens and characters of each answer that deltas have given
        self._news: dict[int, None] = {}  # the answers with more than that, in order
        self._waiting: list[Waiting] = []  # tasks that wait for news
        self._waiting_for_end: list[Waiting] = []
        self._done = False
        self._callbacks: list[Callable[[Handle], None]] = []

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._done

    def cancel(self) -> None:
        """Stop the request and free all that it holds. Its readers get CancelledError. Does nothing once it is done."""
        cancel = self._cancel
        if self._finish(CancelledError(f"request {self.request_id!r} was cancelled")):
            cancel()

    def take(self) -> list[Delta]:
        """What is new by now, one delta an answer, which no iterator will give again; waits for none."""
        with self._lock:
            return [self._delta() for _ in range(len(self._news))]

    def result(self, timeout: float | None = None) -> Completion:
        """The whole completion, once it is there.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it is not there yet; the request goes on.
            RequestError: it failed; the class says how (see ``llava_fast.errors``).
            ImageError: one of its images cannot be used.
            EngineClosedError: the engine was closed before it was done.
        """
        self._wait_until_done(timeout)
        return self._outcome()

    def add_done_callback(self, act: Callable[[Handle], None]) -> None:
        """Call ``act(handle)`` once nothing more will come, from the thread that ends it; at once where that has
        happened. It should be short and must not raise."""
        with self._lock:
            if not self._done:
                self._callbacks.append(act)
                return
        act(self)

    def __iter__(self) -> Iterator[Delta]:
        """The deltas of all answers as they come. Raises as :meth:`result` when the request fails."""
        while True:
            self._wait(lambda: bool(self._news) or self._done, self._news_came)
            if (delta := self._next()) is None:
                return
            yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            await self._async_wait(lambda: bool(self._news) or self._done, self._waiting)
            if (delta := self._next()) is None:
                return
            yield delta
            await asyncio.sleep(0)  # who reads more slowly than the engine writes never waits: others must have a turn

    def __await__(self) -> Generator[None, None, Completion]:
        yield from self._async_wait(lambda: self._done, self._waiting_for_end).__await__()
        return self._outcome()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Handle:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _next(self) -> Delta | None:
        """What is new in one answer; None at the end."""
        with self._lock:
            if self._news:
                return self._delta()
        self._outcome()
        return None

    def _delta(self) -> Delta:
        """What is new in the first answer with news; under the lock."""
        index = next(iter(self._news))
        del self._news[index]
        self._spell(index)
        output, (tokens, characters) = self._completion.outputs[index], self._given[index]
        self._given[index] = len(output.token_ids), len(output.text)
        return Delta(
            output.text[characters:],
            tuple(output.token_ids[tokens:]),
            output.finish_reason,
            index,
            tuple(output.logprobs[tokens:]),
        )

    def _spell(self, index: int) -> None:
        """The text of an answer's tokens so far, where the engine did not have to look at it; under the lock."""
        stream, output = self._texts[index], self._completion.outputs[index]
        if stream.watches:
            return
        spoken = len(output.token_ids) - (output.finish_reason == "stop")  # the token that ends an answer is no text
        if new := output.token_ids[len(stream) : spoken]:
            output.text += stream.push(*new)[0]
        if output.finish_reason:
            output.text += stream.finish()

    def _outcome(self) -> Completion:
        if self._completion.error is not None:
            raise self._completion.error
        return self._completion

    def _wait_until_done(self, timeout: float | None = None) -> None:
        self._wait(lambda: self._done, self._ended, timeout)

    def _wait(self, ready: Callable[[], bool], signal: Condition, timeout: float | None = None) -> None:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if ready():
                    return
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {self.request_id!r} is not done after {timeout} s; it goes on")
                drive = self._drive
                if drive is None:
                    self._asleep += signal is self._news_came
                    signal.wait(left)
                    self._asleep -= signal is self._news_came
                    continue
            drive()

    async def _async_wait(self, ready: Callable[[], bool], waiting: list[Waiting]) -> None:
        while True:
            with self._lock:
                if ready():
                    return
                event = asyncio.Event()
                waiting.append((asyncio.get_running_loop(), event))
            await event.wait()

    # ---- the engine's side

    def _on_cancel(self, act: Callable[[], None]) -> None:
        self._cancel = act

    def _describe(self, prompt: Prompt, texts: list[TextStream], scored: bool) -> None:
        """texts: one an answer, to which the engine pushes where they watch, else the handle as it is read."""
        completion, self._texts = self._completion, texts
        completion.prompt_tokens, completion.image_tokens = len(prompt.ids), prompt.rows * len(prompt.images)
        completion.prompt_logprobs = [None] * len(prompt.ids) if scored else None

    def _begin(self, queue_s: float, cached: int) -> None:
        self._completion.queue_s, self._completion.cached_tokens = queue_s, cached

    def _first_token(self, submitted: float) -> float:
        self._completion.first_token_s = time.monotonic() - submitted
        return self._completion.first_token_s

    def _publish(
        self, index: int, token: int, reason: str | None, text: str = "", score: TokenLogprob | None = None
    ) -> None:
        """A new token of an answer; ``text``: where its stream watches."""
        with self._lock:
            if self._done:
                return
            output = self._completion.outputs[index]
            output.token_ids.append(token)
            output.finish_reason = reason
            if text:
                output.text += text
            if score is not None:
                output.logprobs.append(score)
            self._news[index] = None
            if self._asleep:
                self._news_came.notify_all()
            if self._waiting:
                _wake(self._waiting)

    def _finish(self, error: Exception | None, total_s: float | None = None) -> bool:
        """Returns whether this call was the one that ended it."""
        with self._lock:
            if self._done:
                return False
            for index in range(len(self._texts)):
                self._spell(index)
            self._completion.error, self._completion.total_s = error, total_s
            self._done = True
            self._cancel, self._drive = _nothing, None  # the engine must not be kept by what it has finished
            callbacks, self._callbacks = self._callbacks, []
            self._news_came.notify_all()
            self._ended.notify_all()
            _wake(self._waiting)
            _wake(self._waiting_for_end)
        for act in callbacks:
            act(self)
        return True


def _wake(waiting: list[Waiting]) -> None:
    """Wake the tasks; none waits any more."""
    for loop, event in waiting:
        try:
            loop.call_soon_threadsafe(event.set)
        except RuntimeError:  # that loop was closed; nobody waits any more
            continue
    waiting.clear()


def _nothing() -> None:
    return None
