"""Handle: what ``submit`` returns. Read from any thread or any event loop; written by the engine."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from threading import Condition

from llava_fast.engine.prompt import Prompt
from llava_fast.engine.request import Completion, Delta, Output
from llava_fast.errors import CancelledError


class Handle:
    """A submitted request.

    Iterate over it (``for`` or ``async for``) for the deltas as they come, ask for the whole with :meth:`result` or
    ``await handle``, stop it with :meth:`cancel`. As a context manager (``with`` or ``async with``) it is cancelled on
    the way out if it is not done by then. One reader iterates; any number may wait for the result.
    """

    def __init__(self, request_id: str, n: int, drive: Callable[[], None] | None):
        self.request_id = request_id
        self._completion = Completion(request_id, [Output(index) for index in range(n)])
        self._cancel: Callable[[], None] = _nothing
        self._drive = drive  # without a thread of the engine's own, who waits works
        self._changed = Condition()
        self._deltas: deque[Delta] = deque()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
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
        """The deltas that are there already, which no iterator will give again; waits for none."""
        return [self._deltas.popleft() for _ in range(len(self._deltas))]

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
        self._wait(lambda: self._done, timeout)
        return self._outcome()

    def add_done_callback(self, act: Callable[[Handle], None]) -> None:
        """Call ``act(handle)`` once nothing more will come, from the thread that ends it; at once where that has
        happened. It should be short and must not raise."""
        with self._changed:
            if not self._done:
                self._callbacks.append(act)
                return
        act(self)

    def __iter__(self) -> Iterator[Delta]:
        """The deltas of all answers as they come. Raises as :meth:`result` when the request fails."""
        while True:
            self._wait(lambda: bool(self._deltas) or self._done, None)
            if not self._deltas:
                self._outcome()
                return
            yield self._deltas.popleft()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            await self._async_wait(lambda: bool(self._deltas) or self._done)
            if not self._deltas:
                self._outcome()
                return
            yield self._deltas.popleft()

    def __await__(self) -> Generator[None, None, Completion]:
        yield from self._async_wait(lambda: self._done).__await__()
        return self._outcome()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Handle:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _outcome(self) -> Completion:
        if self._completion.error is not None:
            raise self._completion.error
        return self._completion

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> None:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                if ready():
                    return
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {self.request_id!r} is not done after {timeout} s; it goes on")
                drive = self._drive
                if drive is None:
                    self._changed.wait(left)
                    continue
            drive()

    async def _async_wait(self, ready: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                if ready():
                    return
                event = asyncio.Event()
                self._waiting.append((asyncio.get_running_loop(), event))
            await event.wait()

    # ---- the engine's side

    def _wait_until_done(self) -> None:
        self._wait(lambda: self._done, None)

    def _on_cancel(self, act: Callable[[], None]) -> None:
        self._cancel = act

    def _describe(self, prompt: Prompt, scored: bool) -> None:
        completion = self._completion
        completion.prompt_tokens, completion.image_tokens = len(prompt.ids), prompt.rows * len(prompt.images)
        completion.prompt_logprobs = [None] * len(prompt.ids) if scored else None

    def _begin(self, queue_s: float, cached: int) -> None:
        self._completion.queue_s, self._completion.cached_tokens = queue_s, cached

    def _first_token(self, submitted: float) -> float:
        self._completion.first_token_s = time.monotonic() - submitted
        return self._completion.first_token_s

    def _publish(self, delta: Delta) -> None:
        with self._changed:
            if self._done:
                return
            self._completion.outputs[delta.index].add(delta)
            self._deltas.append(delta)
            self._wake()

    def _finish(self, error: Exception | None, total_s: float | None = None) -> bool:
        """Returns whether this call was the one that ended it."""
        with self._changed:
            if self._done:
                return False
            self._completion.error, self._completion.total_s = error, total_s
            self._done = True
            self._cancel, self._drive = _nothing, None  # the engine must not be kept by what it has finished
            callbacks, self._callbacks = self._callbacks, []
            self._wake()
        for act in callbacks:
            act(self)
        return True

    def _wake(self) -> None:
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that loop was closed; nobody waits any more
                continue


def _nothing() -> None:
    return None
