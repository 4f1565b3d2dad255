"""Apps on the built-in model, over real loopback."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn
from openai import OpenAI
from PIL import Image

import llava_fast as lf
from llava_fast.pretrained import built_in
from llava_fast.serve import Settings, create_app

KEY = "a-key-for-the-tests"


@pytest.fixture(scope="session")
def loaded():
    return lf.load(built_in())


@pytest.fixture(scope="package")
def engine(loaded):
    with lf.Engine(*loaded, lf.EngineConfig(kv_cache_bytes=1 << 25, max_sequences=16)) as engine:
        yield engine


class Serving:
    """Attributes: app; url, with the prefix that the app is mounted under."""

    def __init__(self, app: Any, url: str):
        self.app, self.url = app, url

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def serving(app: Any, prefix: str = "") -> Iterator[Serving]:
    """``app`` under uvicorn in a thread, at a free port of loopback."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield Serving(app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{prefix}")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="package")
def server(engine):
    with serving(create_app(engine, Settings(model_name="tiny", max_n=4, max_images=3, max_image_pixels=250_000))) as s:
        yield s


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@contextmanager
def slowed(engine: lf.Engine, seconds: float = 0.005) -> Iterator[None]:
    """Each of its steps takes so much longer: no answer is done before a client has left."""
    step = engine.step
    engine.step = lambda: (time.sleep(seconds), step())[1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.step  # type: ignore[misc]


def wait_for(true: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def png(seed: int = 0, size: tuple[int, int] = (60, 40)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def user(*parts: Any) -> list[dict[str, Any]]:
    """One user's message: texts, and bytes for images."""
    made = [image_part(part) if isinstance(part, bytes) else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": made}]


def engine_messages(*parts: Any) -> list[dict[str, Any]]:
    """The same in the engine's form."""
    made = [
        {"type": "image", "image": part} if isinstance(part, bytes) else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": made}]
