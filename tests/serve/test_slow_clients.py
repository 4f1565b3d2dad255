"""uvicorn with limits of time for its clients, over loopback: the slow are cut off, and the others notice nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from llava_fast.serve import slow_clients
from llava_fast.serve.slow_clients import limited

SECONDS = 0.5
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope, receive, send) -> None:
    """Echoes a body, but /refuse does not read it; /long sends more than the system's buffers hold; /close ends such an
    answer before it is sent."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/refuse":
        await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"too large"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message.get("body", b""), message.get("more_body", False)
    closing = [(b"connection", b"close")] if scope["path"] == "/close" else []
    await send({"type": "http.response.start", "status": 200, "headers": closing})
    if scope["path"] == "/":
        await send({"type": "http.response.body", "body": b"said:" + body})
        return
    for _ in range(40 if scope["path"] == "/long" else 1):
        size = 1 << 20 if scope["path"] == "/long" else 12 << 20
        await send({"type": "http.response.body", "body": bytes(size), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(app, port=0, log_level="error", http=limited(SECONDS, SECONDS), lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield server
    server.should_exit = True
    thread.join()


def connect(server: uvicorn.Server, window: int = 0) -> socket.socket:
    connection = socket.socket()
    if window:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.settimeout(20)
    connection.connect(server.servers[0].sockets[0].getsockname())
    return connection


def answer(connection: socket.socket) -> bytes:
    said = b""
    while not said.endswith((b"\r\n0\r\n\r\n",)):
        piece = connection.recv(1 << 16)
        assert piece, said
        said += piece
    return said


def until_closed(connection: socket.socket, while_open: Callable[[], None] = lambda: None) -> bytes:
    """What the server said until it closed the connection, which it must."""
    said, until = b"", time.monotonic() + 30
    try:
        while True:
            assert time.monotonic() < until, "still open"
            while_open()
            connection.settimeout(SECONDS / 10)
            try:
                piece = connection.recv(1 << 16)
            except TimeoutError:
                continue
            if not piece:
                return said
            said += piece
    except ConnectionError:
        return said


def left(server: uvicorn.Server, connection: socket.socket) -> bool:
    port = connection.getsockname()[1]
    return any(one.client and one.client[1] == port for one in list(server.server_state.connections))


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX: ", b"G"])
def test_a_head_that_never_ends(server: uvicorn.Server, start: bytes):
    with connect(server) as connection:
        connection.sendall(start)
        assert until_closed(connection, lambda: connection.send(b"x") and None if start else None) == b""


def test_a_second_head_that_never_ends(server: uvicorn.Server):
    with connect(server) as connection:
        connection.sendall(GET)
        assert b"said:" in answer(connection)
        said = until_closed(connection, lambda: connection.send(b"x") and None)
        assert said == b""


def test_ordinary_requests_on_one_connection(server: uvicorn.Server):
    with connect(server) as connection:
        for _ in range(5):
            connection.sendall(GET[:9])
            connection.sendall(GET[9:])
            assert b"said:" in answer(connection)
            threading.Event().wait(SECONDS / 2)  # five of them take longer than a head may


def test_a_slow_body_is_left_to_the_app(server: uvicorn.Server):
    with connect(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\n")
        for _ in range(6):
            connection.sendall(b"x")
            threading.Event().wait(SECONDS / 3)
        assert b"said:xxxxxx" in answer(connection)


def test_who_is_refused_in_mid_body_reads_why(server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch):
    """The client sends all of it before it reads: a reset would take the answer away."""
    monkeypatch.setattr(slow_clients, "_LINGER", 20)  # on a busy machine too
    with connect(server) as connection:
        connection.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (8 << 20))
        connection.sendall(bytes(8 << 20))
        said = until_closed(connection)
        assert said.startswith(b"HTTP/1.1 413") and b"too large" in said


def test_who_is_refused_and_goes_on_sending_is_cut_off(server: uvicorn.Server):
    with connect(server) as connection:
        connection.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"1000\r\n" + bytes(4096) + b"\r\n")
                threading.Event().wait(0.02)
        assert not left(server, connection)


@pytest.mark.parametrize("path", [b"/long", b"/close"])
def test_an_answer_that_nobody_reads(server: uvicorn.Server, path: bytes):
    with connect(server, window=4096) as connection:
        connection.sendall(GET.replace(b"/ ", path + b" ", 1))
        assert connection.recv(12) == b"HTTP/1.1 200"
        for _ in range(1000):
            if not left(server, connection):
                break
            threading.Event().wait(0.02)
        assert not left(server, connection)


def test_a_long_answer_that_is_read(server: uvicorn.Server):
    with connect(server) as connection:
        connection.sendall(GET.replace(b"/ ", b"/close ", 1))
        assert len(until_closed(connection)) > 12 << 20


class Pipe:
    """A transport that nobody reads from, but for what ``unsent`` is set to."""

    def __init__(self) -> None:
        self.unsent, self.aborted, self.closing = 1 << 20, False, False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default


def piped() -> tuple[H11Protocol, Pipe]:
    config = uvicorn.Config(app, log_level="error")
    protocol = limited(100, 0.05)(config, ServerState(), {}, asyncio.get_running_loop())
    pipe = Pipe()
    protocol.connection_made(pipe)  # type: ignore[arg-type]
    return protocol, pipe


@pytest.mark.parametrize("resumed", [False, True])
def test_closing_does_not_wait_for_a_client_that_reads_nothing(resumed: bool):
    async def run() -> None:
        protocol, pipe = piped()
        protocol.transport.close()
        if resumed:  # it read some, and then no more
            protocol.pause_writing()
            protocol.resume_writing()
        assert pipe.closing
        assert not pipe.aborted
        await asyncio.sleep(0.2)
        assert pipe.aborted

    asyncio.run(run())


def test_a_client_that_catches_up_is_not_cut_off():
    async def run() -> None:
        protocol, pipe = piped()
        protocol.pause_writing()
        protocol.resume_writing()
        await asyncio.sleep(0.2)
        assert not pipe.aborted

    asyncio.run(run())


@pytest.mark.parametrize("step", [1 << 15, 1 << 14])
def test_a_slow_reader_has_time_as_long_as_it_takes_enough(step: int):
    async def run() -> bool:
        protocol, pipe = piped()
        protocol.pause_writing()
        for _ in range(4):
            before = protocol._unsent  # type: ignore[attr-defined]
            pipe.unsent -= step
            for _ in range(1000):  # until its time was up, and was given again or not
                if pipe.aborted or protocol._unsent != before:  # type: ignore[attr-defined]
                    break
                await asyncio.sleep(0.001)
        return not pipe.aborted

    assert asyncio.run(run()) is (step == 1 << 15)
