"""A web server on loopback that says exactly the bytes it is told to, and a network that leads every address to it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpcore2

Say = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Web:
    """Attributes:
    pages: by path, the bytes of a whole answer, or a function that writes it.
    requests: heads received, as text.
    open: connections that have not been closed.
    """

    pages: dict[str, bytes | Say]
    port: int = 0
    requests: list[str] = field(default_factory=list)
    open: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            page = self.pages[head.split(" ")[1]]
            if isinstance(page, bytes):
                writer.write(page)
                await writer.drain()
            else:
                await page(writer)
            await reader.read()  # until the client closes
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def closed(self) -> None:
        """Returns once no connection is open, and never if one is left."""
        async with asyncio.timeout(10):
            while self.open:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(
    pages: dict[str, bytes | Say], host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Web]:
    web = Web(pages)
    server = await asyncio.start_server(web.answer, host, 0, ssl=tls)
    async with server:
        web.port = server.sockets[0].getsockname()[1]
        yield web
        await web.closed()


def page(
    body: bytes, *headers: str, status: str = "200 OK", kind: str | None = "image/png", length: bool = True
) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if kind is not None:
        lines.append(f"Content-Type: {kind}")
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def moved(location: str, status: str = "302 Found") -> bytes:
    return page(b"", f"Location: {location}", status=status)


class Network(httpcore2.AsyncNetworkBackend):
    """Notes every address that is dialled, and connects to a port of loopback instead."""

    def __init__(self, port: int, dead: tuple[str, ...] = ()):
        self.port, self.dead, self.dialled = port, dead, list[tuple[str, int]]()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.dialled.append((host, port))
        if host in self.dead:
            raise httpcore2.ConnectError("dead")
        return await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", self.port, timeout)


class Names:
    """A resolver of our own. Each question takes the next of a name's answers; the last one stays."""

    def __init__(self, **answers: list[list[str]] | list[str]):
        self.answers = {name.replace("_", "."): answer for name, answer in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answer = self.answers.get(host)
        if answer is None:
            raise OSError("no such name")
        if answer and isinstance(answer[0], list):
            return answer.pop(0) if len(answer) > 1 else answer[0]  # type: ignore[return-value]
        return answer  # type: ignore[return-value]
