"""Bodies: read under limits of size, shape and time, and parsed without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.requests import Request

from llava_fast.serve.gate import Gate
from llava_fast.serve.problems import ApiError
from llava_fast.serve.protocol import Body, validate

_SMALL = 1 << 16  # bytes that are parsed within a millisecond, where a thread would take as long to begin
Found = TypeVar("Found")
_CLOSE = {"connection": "close"}  # what is left of the body is not read


class Threads:
    """A few threads for work that would hold up the event loop."""

    def __init__(self, count: int = 4):
        self._limiter = CapacityLimiter(count)

    async def run(self, work: Callable[..., Found], *args: Any) -> Found:
        return await anyio.to_thread.run_sync(work, *args, limiter=self._limiter)


async def read(kind: type[Body], request: Request, gate: Gate, threads: Threads) -> Body:
    """The JSON body of a request.

    Raises:
        ApiError: 400, 408, 413 or 415; or 503 where the server holds too many bodies.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another origin can send other types without asking first, and with the browser's credentials.
        raise ApiError(415, "the body must be JSON, with the header 'content-type: application/json'", headers=_CLOSE)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "the body must not be compressed", headers=_CLOSE)
    try:
        async with asyncio.timeout(gate.settings.body_seconds):
            body = await _collect(request, gate)
    except TimeoutError:
        seconds = gate.settings.body_seconds
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", headers=_CLOSE) from None
    if len(body) <= _SMALL:
        return validate(kind, body)
    return await threads.run(validate, kind, body)


async def _collect(request: Request, gate: Gate) -> bytes:
    settings, visit = gate.settings, request.scope["visit"]
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:18]) > settings.max_body_bytes:
        raise _too_large(settings.max_body_bytes)
    chunks, size, values = [], 0, 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)
        gate.hold(visit, len(chunk))
        values += sum(chunk.count(mark) for mark in (b"{", b"[", b",", b":"))
        if values > settings.max_values:
            message = f"the body has more than {settings.max_values} values (brackets, commas and colons)"
            raise ApiError(413, message, code="too_many_values", headers=_CLOSE)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes; send smaller images", code="too_large", headers=_CLOSE)
