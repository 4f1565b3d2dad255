"""Limits of time for clients that send and take a byte at a time, which uvicorn does not have:

    uvicorn.Config(app, http=limited(head_seconds=10, send_seconds=30))

Without them, who sends a header a minute on some thousand connections, or asks for long answers and reads none of them,
holds every file descriptor of the server for as long as they like. A body that does not arrive is the app's to refuse.

And who is refused in the middle of a body gets to read why: a connection that is closed while more is coming is reset,
and what the client has not read is lost with it. So it is half closed, and what comes is thrown away for a moment, as
RFC 9112, section 9.6, asks for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_LINGER = 1.0  # seconds in which a client can read why its body was refused
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
            self._lingering = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Closing(transport, self._close))  # type: ignore[arg-type]
            self._head.start(transport.abort)

        def data_received(self, data: bytes) -> None:
            if self._lingering:
                return
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

        def _close(self, transport: asyncio.Transport) -> None:
            coming = self.cycle is not None and self.cycle.more_body and not transport.is_closing()
            if coming and not self._lingering and transport.can_write_eof():  # TLS cannot
                self._lingering = True
                transport.write_eof()
                transport.resume_reading()
                self.loop.call_later(_LINGER, transport.close)
            else:
                transport.close()
            self._start_sending()

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
    """A transport whose closing is the protocol's to do: asyncio's own waits for a client that reads nothing."""

    def __init__(self, transport: Any, close: Callable[[Any], None]):
        self._transport, self._close = transport, close

    def close(self) -> None:
        self._close(self._transport)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
