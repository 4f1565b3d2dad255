"""Errors as OpenAI's API words them: a status, and ``{"error": {"message", "type", "param", "code"}}``.

Messages say what is wrong with the request. What is wrong with the server goes to its log: a client is told no trace,
no path and no address.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from llava_fast.errors import (
    CancelledError,
    DeadlineError,
    EngineClosedError,
    ImageError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
)

_ADDRESS = re.compile(r"\s*\b(at )?0x[0-9a-fA-F]{4,}")
_LONGEST = 600  # characters of a message


class ApiError(Exception):
    """What a client is told. ``headers`` go with the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        message = _ADDRESS.sub("", str(self))
        if len(message) > _LONGEST:
            message = message[:_LONGEST] + "..."
        return {"error": {"message": message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def _type(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def unavailable(message: str, code: str, seconds: int = 1) -> ApiError:
    """Not now: the client may try again after so many seconds."""
    return ApiError(503, message, code=code, headers={"retry-after": str(seconds)})


def closed() -> ApiError:
    return unavailable("the server is shutting down", "shutting_down", 5)


def of_engine(error: Exception) -> ApiError | None:
    """What a client is told about an error of the engine; None for one that is the server's own fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, ImageError):
        return ApiError(400, str(error), param="messages", code="invalid_image")
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error))
    if isinstance(error, DeadlineError):  # clients try 504 again by themselves, which would only take as long
        message = "the answer was not complete within the server's time for one request; ask for fewer tokens"
        return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, QueueFullError):
        return unavailable("the server has as many requests as it takes; try again later", "overloaded")
    if isinstance(error, EngineClosedError | CancelledError):
        return closed()
    return None


def internal(request_id: str) -> ApiError:
    return ApiError(500, f"internal error; the server's log has it under request id {request_id}", code="internal")
