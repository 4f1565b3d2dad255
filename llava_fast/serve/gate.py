"""Gate: what every request passes on its way in and out, whatever it asks for.

In: its id, the key, whether there is room. Out: the id again, its line in the access log, its numbers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_fast.engine import Handle
from llava_fast.serve.metrics import Metrics
from llava_fast.serve.problems import ApiError, closed, internal, unavailable
from llava_fast.serve.settings import Settings

log = logging.getLogger("llava_fast.serve")
access = logging.getLogger("llava_fast.serve.access")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_UNCOUNTED = {"/health", "/metrics", "/version", "/", "/v1/models"}  # cheap, and wanted while the server is full


@dataclass
class Visit:
    """One HTTP request on its way through, in ``scope["visit"]``.

    Attributes:
        request_id: the client's, where it sent one that is harmless, else made up.
        tenant: tells keys apart without naming them; empty where there are none.
        began: seconds on the monotonic clock.
        body_bytes: held of the budget for bodies.
        notes: what the access log says beyond the usual. Never a text of the conversation.
    """

    request_id: str
    began: float
    tenant: str = ""
    body_bytes: int = 0
    status: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


class Gate:
    """ASGI middleware, and the state that the whole app shares.

    Attributes:
        draining: refuse whatever is new.
        running: requests that are being worked on.
        held_bytes: of their bodies.
        handles: what the engine is doing for them.
    """

    def __init__(self, settings: Settings, metrics: Metrics):
        self.settings, self.metrics = settings, metrics
        self.draining = False
        self.running = 0
        self.held_bytes = 0
        self.handles: set[Handle] = set()
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    def wrap(self, app: ASGIApp) -> ASGIApp:
        async def passing(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._http(app, scope, receive, send)
            elif scope["type"] == "lifespan":
                await app(scope, receive, send)
            else:  # a websocket: there are none here
                await send({"type": "websocket.close", "code": 1000})

        return passing

    async def _http(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        visit = scope["visit"] = Visit(_request_id(headers.get(b"x-request-id", b"")), time.monotonic())
        path = scope["path"].removeprefix(scope.get("root_path", ""))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", visit.request_id.encode())]
            await send(message)

        counted = path not in _UNCOUNTED
        entered = False
        try:
            if b"content-length" in headers and b"transfer-encoding" in headers:  # parsers differ: a way to smuggle
                message = "a request has Content-Length or Transfer-Encoding, not both"
                raise ApiError(400, message, headers={"connection": "close"})
            visit.tenant = self._check_key(path, headers)
            if counted:
                self._enter()
                entered = True
            await app(scope, receive, answer)
        except ApiError as error:
            if not visit.status:
                await error.response()(scope, receive, answer)
        except (ClientDisconnect, OSError):  # nobody is there to be told
            pass
        except Exception:
            log.exception("request %s failed", visit.request_id)
            if not visit.status:
                await internal(visit.request_id).response()(scope, receive, answer)
        finally:
            if entered:
                self.running -= 1
            self.held_bytes -= visit.body_bytes
            self._record(scope, visit)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> str:
        """The tenant's name; empty where no key is asked for."""
        if not self._keys or path == "/health":
            return ""
        given = hashlib.sha256(_key(headers.get(b"authorization", b""))).digest()
        found = sum([hmac.compare_digest(given, key) for key in self._keys])  # all of them: as long for any key
        if not found:
            challenge, how = "Bearer", "send 'Authorization: Bearer KEY'"
            if path == "/":  # browsers ask for a name and a password, and send them with what the page asks for too
                challenge, how = 'Basic realm="llava-fast", charset="UTF-8"', "give it as the password, with any name"
            message = f"Incorrect or missing API key: {how}."
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})
        return given.hex()[:12]

    def _enter(self) -> None:
        if self.draining:
            raise closed()
        if self.running >= self.settings.max_concurrent:
            raise unavailable("the server has as many requests as it takes; try again later", "overloaded")
        self.running += 1

    def give_up(self) -> None:
        """End what still runs: its clients are told 503, or by an event in a stream."""
        for handle in list(self.handles):
            handle.cancel()

    def hold(self, visit: Visit, size: int) -> None:
        """Count ``size`` more bytes of a body.

        Raises:
            ApiError: 503, there is no room for them now.
        """
        if self.held_bytes + size > self.settings.max_total_bytes:
            raise unavailable("the server has as many bytes of requests as it takes; try again later", "overloaded")
        self.held_bytes += size
        visit.body_bytes += size

    def _record(self, scope: Scope, visit: Visit) -> None:
        seconds = time.monotonic() - visit.began
        status = visit.status or 499  # the client left before there was an answer
        route = getattr(scope.get("route"), "path", "unknown")
        self.metrics.http(scope["method"], route, status, seconds)
        if not access.isEnabledFor(logging.INFO):
            return
        line = {
            "time": round(time.time(), 3),
            "request_id": visit.request_id,
            "client": scope["client"][0] if scope.get("client") else None,
            "tenant": visit.tenant or None,
            "method": scope["method"][:16],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(1000 * seconds, 1),
            **visit.notes,
        }
        access.info("%s", json.dumps({name: value for name, value in line.items() if value is not None}))


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    return text if _NAME.match(text) else "req-" + secrets.token_hex(12)


def _key(authorization: bytes) -> bytes:
    """The key in a header: a bearer token, or the password of a browser that was asked for one."""
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
