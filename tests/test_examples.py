"""The examples run, on a small random checkpoint."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

import llava_fast as lf
from tests.generate.conftest import checkpoint  # noqa: F401  # a fixture
from tests.serve.conftest import slowed

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIG = lf.EngineConfig(kv_cache_bytes=1 << 21, max_sequences=8)


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # FastAPI looks up annotations there
    spec.loader.exec_module(module)
    return module


def test_plain_loop(checkpoint, monkeypatch, capsys):  # noqa: F811
    questions = ["What is this?", "How many?"]
    monkeypatch.setattr(sys, "argv", ["plain_loop", str(checkpoint), str(checkpoint / "a.png"), *questions])
    load_example("plain_loop").main()
    told = capsys.readouterr().out
    assert all(f"{question} '" in told for question in questions)
    monkeypatch.setattr(sys, "argv", ["plain_loop", str(checkpoint), "no-such.png", "What is this?"])
    load_example("plain_loop").main()
    assert "failed: ImageError" in capsys.readouterr().out


class Client:
    """What a server would do: one HTTP request, its body read, its response gathered."""

    def __init__(self, app, query: str, body: bytes = b"", leave_after: int | None = None):
        self.app, self.query, self.body, self.leave_after = app, query, body, leave_after
        self.status, self.text, self.chunks, self.left = None, "", 0, asyncio.Event()
        self.sent = False

    async def receive(self):
        if not self.sent:
            self.sent = True
            return {"type": "http.request", "body": self.body}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.text += message.get("body", b"").decode()
        self.chunks += 1
        if self.chunks == self.leave_after:
            self.left.set()

    async def post(self):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/ask",
            "raw_path": b"/ask",
            "root_path": "",
            "query_string": self.query.encode(),
            "headers": [],
        }
        await asyncio.wait_for(self.app(scope, self.receive, self.send), 60)
        return self


def test_embed_fastapi(checkpoint):  # noqa: F811
    pytest.importorskip("fastapi")
    app = load_example("embed_fastapi").create_app(str(checkpoint), CONFIG)
    picture = (checkpoint / "a.png").read_bytes()

    async def visit():
        async with app.router.lifespan_context(app):
            engine = app.state.engine
            plain = await Client(app, "question=What+is+this&max_tokens=6", picture).post()
            assert plain.status == 200 and plain.text
            parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this"}]
            request = lf.Request(
                messages=[{"role": "user", "content": parts}], sampling=lf.SamplingParams(max_tokens=6)
            )
            assert plain.text == (await engine.submit(request)).text

            bad = await Client(app, "question=What", b"no picture").post()
            assert bad.status == 400 and "not an image" in bad.text
            assert (await Client(app, "question=What&max_tokens=0").post()).status == 400

            with slowed(engine):
                for leave_after in (0, 2):  # before the answer and during it, which is how one sees that it is streamed
                    gone = Client(app, "question=Go+on&max_tokens=400", leave_after=leave_after)
                    if not leave_after:
                        gone.left.set()
                    await gone.post()
                    assert gone.chunks < 100
                while engine.stats().running or engine.stats().waiting:
                    await asyncio.sleep(0.01)
            assert engine.stats().finished["cancelled"] == 2
            assert engine.stats().blocks_held == 0

    asyncio.run(visit())
