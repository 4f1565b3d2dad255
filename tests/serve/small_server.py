"""The server as the tests of the page want it: slow when told to, breaking off, its requests kept."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import llava_fast as lf
from llava_fast.serve import Settings, create_app


class Server:
    """The page and the API in a thread.

    Attributes:
        url: of the page.
        pause: seconds that the engine waits before each step, so that a test can see an answer grow.
        bodies: of the chat requests that came.
    """

    def __init__(self, engine: lf.Engine, *, key: str = "", prefix: str = "", api_keys: tuple[str, ...] = ()):
        self.engine, self.pause = engine, 0.0
        self.bodies: list[dict[str, Any]] = []
        step = engine.step

        def slow_step() -> bool:
            if self.pause:
                time.sleep(self.pause)
            return step()

        engine.step = slow_step  # type: ignore[method-assign]
        app: ASGIApp = create_app(engine, Settings(model_name="tiny", api_keys=api_keys))
        if prefix:
            app = Starlette(routes=[Mount(prefix, app=app)])
        if key:
            app = _Keyed(app, key)
        app = _Recorded(app, self.bodies)
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


class _Recorded:
    """Keeps the bodies of chat requests, as they went by."""

    def __init__(self, app: ASGIApp, bodies: list[dict[str, Any]]):
        self.app, self.bodies = app, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/chat/completions"):
            return await self.app(scope, receive, send)
        chunks: list[bytes] = []

        async def listen() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                chunks.append(message.get("body", b""))
                if not message.get("more_body"):
                    self.bodies.append(json.loads(b"".join(chunks)))
            return message

        await self.app(scope, listen, send)


class _Keyed:
    """The page is open, as behind a proxy that serves it, and the API asks for a key."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keyed = scope["type"] != "http" or scope["path"] == "/"
        if keyed or dict(scope["headers"]).get(b"authorization") == self.wanted:
            await self.app(scope, receive, send)
        else:
            await JSONResponse({"error": {"message": "Incorrect or missing API key."}}, 401)(scope, receive, send)


@contextlib.contextmanager
def serving(engine: lf.Engine, **options: Any) -> Iterator[Server]:
    server = Server(engine, **options)
    try:
        yield server
    finally:
        server.close()
