"""As much of OpenAI's API as the page uses, on a real engine over loopback, for the tests of the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import llava_fast as lf
from llava_fast.errors import LlavaError, PromptTooLongError, QueueFullError
from llava_fast.serve.page import page_route


class Server:
    """The page and the API in a thread.

    Attributes:
        url: of the page.
        pause: seconds that the engine waits before each step, so that a test can see an answer grow.
        bodies: of the chat requests that came.
    """

    def __init__(self, engine: lf.Engine, *, key: str = "", prefix: str = ""):
        self.engine, self.pause, self.bodies = engine, 0.0, []
        step = engine.step

        def slow_step() -> bool:
            if self.pause:
                time.sleep(self.pause)
            return step()

        engine.step = slow_step  # type: ignore[method-assign]
        routes: list[Any] = [
            page_route(),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        app = Starlette(
            routes=[Mount(prefix, routes=routes)] if prefix else routes,
            middleware=[Middleware(_Keyed, key=key)] if key else [],
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}{prefix}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self._loop = self._server.servers[0].get_loop()

    def cut(self) -> None:
        """Every connection breaks."""

        def abort() -> None:
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()

        self._loop.call_soon_threadsafe(abort)

    def close(self) -> None:
        self._server.should_exit = True
        self.cut()
        self._thread.join(10)
        del self.engine.step  # type: ignore[misc]

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"data": [{"id": "tiny", "max_model_len": self.engine.max_length}]})

    async def _chat(self, request: HttpRequest) -> Response:
        body = await request.json()
        self.bodies.append(body)
        sampling = lf.SamplingParams(**{name: body[name] for name in ("temperature", "top_p", "max_tokens")})
        handle = None
        try:
            handle = self.engine.submit(lf.Request(messages=_messages(body["messages"]), sampling=sampling))
            deltas = aiter(handle)
            first = await anext(deltas)
        except LlavaError as error:
            codes = {PromptTooLongError: "context_length_exceeded", QueueFullError: "overloaded"}
            status = 503 if isinstance(error, QueueFullError) else 400
            return JSONResponse({"error": {"message": str(error), "code": codes.get(type(error))}}, status)
        return StreamingResponse(_events(handle, first, deltas), media_type="text/event-stream")


async def _events(handle: lf.Handle, first: lf.Delta, deltas: AsyncIterator[lf.Delta]) -> AsyncIterator[str]:
    tokens = 0
    try:
        delta: lf.Delta | None = first
        while delta is not None:
            tokens += len(delta.token_ids)
            choice = {"delta": {"content": delta.text}, "finish_reason": delta.finish_reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(0)
            delta = await anext(deltas, None)
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\ndata: [DONE]\n\n"
    finally:
        handle.cancel()


def _messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's pictures, as data URIs, to bytes."""

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] == "text":
            return given
        return {"type": "image", "image": base64.b64decode(given["image_url"]["url"].split(",")[1])}

    return [
        m if isinstance(m["content"], str) else {"role": m["role"], "content": [part(p) for p in m["content"]]}
        for m in messages
    ]


class _Keyed:
    """The page is open, the API asks for a key."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keyed = scope["type"] != "http" or scope["path"] == "/"
        if keyed or dict(scope["headers"]).get(b"authorization") == self.wanted:
            await self.app(scope, receive, send)
        else:
            await JSONResponse({"error": {"message": "Incorrect or missing API key."}}, 401)(scope, receive, send)


@contextlib.contextmanager
def serving(engine: lf.Engine, **options: str) -> Iterator[Server]:
    server = Server(engine, **options)
    try:
        yield server
    finally:
        server.close()
