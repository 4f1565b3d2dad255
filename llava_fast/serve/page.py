"""The chat page at ``/``: one response with everything in it, written in ``web/`` and put together at the start.

It talks to the API of the app that it is part of, at addresses relative to its own, so it works under any prefix. Its
content security policy names its one script and its one style sheet by their hashes: nothing else runs, nothing is
loaded from elsewhere, and no text can become markup.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llava_fast.data.scenes import Scene, scene_at

_WEB = Path(__file__).with_name("web")
_SCRIPTS = ("theme.js", "pictures.js", "api.js", "text.js", "store.js", "chat.js")  # in one scope, in this order

_SET = 2026  # a set of scenes of its own
_EXAMPLES = (  # number of the scene, and a question of each kind that people ask: all of it, where, how many, and why
    (268, "What is in the picture, where, and how large?"),
    (188, "Which is higher, the square or the star?"),
    (24, "Where is the purple square?"),
    (31, "How many shapes are there?"),
)


def page_route(path: str = "/") -> Route:
    """A route that serves the page. Where it is mounted under a prefix, the API must be under the same one."""
    body, headers = _page()

    async def page(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if headers["etag"] in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="text/html", headers=headers)

    return Route(path, page, methods=["GET"], include_in_schema=False)


def _page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    style = _read("style.css")
    script = "\n".join(_read(name) for name in _SCRIPTS)
    examples = json.dumps([_example(number, question) for number, question in _EXAMPLES]).replace("<", "\\u003c")
    page = _read("index.html")
    for name, text in (("{style}", style), ("{script}", script), ("{examples}", examples)):
        head, tail = page.split(name)  # each stands there once
        page = head + text + tail
    body = page.encode()
    policy = {
        "default-src": "'none'",
        "script-src": _hashed(script),
        "style-src": _hashed(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return body, {
        "content-security-policy": "; ".join(f"{what} {where}" for what, where in policy.items()),
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }


def _read(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _example(number: int, question: str) -> dict[str, Any]:
    scene, _ = scene_at(_SET, number)
    picture = "data:image/png;base64," + base64.b64encode(_png(scene)).decode()
    shapes = ", ".join(f"{shape.name} at the {shape.place}" for shape in scene.shapes)
    return {"picture": picture, "description": f"Example picture: {shapes}", "question": question}


def _png(scene: Scene) -> bytes:
    file = io.BytesIO()
    scene.image().save(file, "PNG", optimize=True)
    return file.getvalue()
