"""A client of the chat API that does little work of its own, which is not what is measured; it imports no torch."""

from __future__ import annotations

import asyncio
import json
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"


async def stream(url: str, body: bytes, first_only: bool = False) -> str:
    """The text of a streamed answer. The server sends whole events: a line that begins with "data: " is one."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {address.hostname}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    text = ""
    try:
        assert b" 200 " in (status := await reader.readline()), status
        while (line := await reader.readline()) != b"data: [DONE]\n":
            assert line, "the connection was closed within an answer"
            if line.startswith(b"data: {"):
                text += "".join(c["delta"].get("content", "") for c in json.loads(line[6:])["choices"])
                if first_only and text:
                    break
    finally:
        writer.close()
    return text


def clients(pipe: Connection, url: str, bodies: list[bytes], first_only: bool) -> None:
    """In a process of their own: asks everything at once whenever it is told to, and sends back the texts."""

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(stream(url, body, first_only) for body in bodies))

    with asyncio.Runner() as runner:
        while pipe.recv():
            pipe.send(runner.run(all_at_once()))
