"""Limits of time for clients that send and take a byte at a time, which uvicorn does not have:

    uvicorn.Config(app, http=limited(head_seconds=10, send_seconds=30))

Without them, who sends a header a minute on some thousand connections, or asks for long answers and reads none of them,
holds every file descriptor of the server for as long as they like. A body that does not arrive is the app's to refuse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_LEAST = 1 << 15  # bytes that a client must take in the time for sending to be given the same time again


def limited(head_seconds: float, send_seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1, which gives a client so many seconds.

    Args:
        head_seconds: from the connection's beginning, or a later request's first byte, to the end of its head. Between
            requests uvicorn's own ``timeout_keep_alive`` holds.
        send_seconds: for taking 32 kB, or the rest, of what waits to be sent, once that is so much that the app was
            told to wait, or the server is about to close the connection.
    """

    class Limited(H11Protocol):
        def __init__(self, *args: Any, **more: Any):
            super().__init__(*args, **more)
            self._head = _Deadline(self.loop, head_seconds)
            self._sending = _Deadline(self.loop, send_seconds)
            self._unsent = 0  # bytes, when the time for sending began

        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Closing(transport, self._start_sending))  # type: ignore[arg-type]
            self._head.start(transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._head.start(self.transport.abort)
            else:
                self._head.stop()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_sending()

        def resume_writing(self) -> None:
            super().resume_writing()
            if not self.transport.is_closing():
                self._sending.stop()

        def _start_sending(self) -> None:
            self._unsent = self.transport.get_write_buffer_size()
            self._sending.start(self._judge_sending)

        def _judge_sending(self) -> None:
            self._sending.stop()
            if self._unsent - self.transport.get_write_buffer_size() >= _LEAST:
                self._start_sending()
            else:
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head.stop()
            super().connection_lost(exc)
            self._sending.stop()

    return Limited


class _Deadline:
    """Runs from the first start to the next stop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float):
        self._loop, self._seconds = loop, seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self, late: Callable[[], None]) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, late)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Closing:
    """A transport that closes although its client reads nothing: asyncio's own waits for what is left to be taken."""

    def __init__(self, transport: Any, closing: Callable[[], None]):
        self._transport, self._closing = transport, closing

    def close(self) -> None:
        self._transport.close()
        self._closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
