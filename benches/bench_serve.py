"""The server beside the bare engine: the same requests to the same engine, over HTTP on loopback and without.

Two figures: many requests at once (tokens a second), and one request's first token. The server runs in a thread of this
process, and its clients in a process of their own, so that their work is not counted as its.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

import llava_fast as lf
from benches.bench_engine import SHAPES, TOKENIZER
from benches.stream_client import clients
from llava_fast.serve import create_app

TOKENS, COUNT = 48, 32


@pytest.fixture(scope="module", params=list(SHAPES))
def served(request):
    """Name, engine and the server's address."""
    config, dtype = SHAPES[request.param]
    model = lf.Llava(config, dtype=dtype, seed=0).requires_grad_(False)
    processor = lf.Processor.from_config(config, lf.processor.Tokenizer.load(TOKENIZER))
    with lf.Engine(model, processor, lf.EngineConfig(kv_cache_bytes=1 << 30, max_sequences=64)) as engine:
        server = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield request.param, engine, f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def asked(number: int, tokens: int) -> tuple[lf.Request, bytes]:
    """A request of the engine, and the same as a body."""
    data, text = picture(number), {"type": "text", "text": f"What is picture {number}, and where?"}
    sampling = lf.SamplingParams(max_tokens=tokens, ignore_eos=True)
    messages = [{"role": "user", "content": [{"type": "image", "image": data}, text]}]
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, text]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True}
    return lf.Request(messages=messages, sampling=sampling), json.dumps(body).encode()


@contextmanager
def asking(url: str, bodies: list[bytes], first_only: bool = False) -> Iterator[Callable[[], list[str]]]:
    """What asks all of them at once from another process, and returns the answers' texts."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=clients, args=(theirs, url, bodies, first_only))
    process.start()

    def ask() -> list[str]:
        pipe.send(True)
        return pipe.recv()

    try:
        yield ask
    finally:
        pipe.send(False)
        process.join()


@pytest.mark.parametrize("impl", ["engine", "server"])
def test_many_requests(benchmark, served, impl):
    name, engine, url = served
    if benchmark.disabled and impl == "engine":
        pytest.skip("with nothing to time, the check beside the server is the same")
    benchmark.group = f"serve, {name}: {COUNT} requests at once, one picture each"
    count, tokens = (COUNT, TOKENS) if benchmark.enabled else (2, 2)
    pairs = [asked(number, tokens) for number in range(count)]

    def direct() -> list[str]:
        return [completion.outputs[0].text for completion in engine.generate(request for request, _ in pairs)]

    with asking(url, [body for _, body in pairs]) as over_http:
        assert over_http() == direct() or engine._model.dtype != torch.float32  # bfloat16 varies with the batch
        work = over_http if impl == "server" else direct
        benchmark.pedantic(work, setup=engine.clear_caches, rounds=5, warmup_rounds=1)
    note(benchmark, count * tokens)


@pytest.mark.parametrize("impl", ["engine", "server"])
def test_first_token(benchmark, served, impl):
    name, engine, url = served
    benchmark.group = f"serve, {name}: first token, one picture"
    request, body = asked(1000, 16)

    def direct() -> str:
        with engine.submit(request) as handle:
            return next((delta.text for delta in handle if delta.text), "")  # random weights may say nothing

    def forget() -> None:
        while engine.stats().running:
            time.sleep(0.001)
        engine.clear_caches()

    with asking(url, [body], first_only=True) as over_http:
        # A chunk may have more than one token in it.
        texts = sorted((over_http()[0], direct()), key=len)
        assert texts[1].startswith(texts[0]) or engine._model.dtype != torch.float32
        work = over_http if impl == "server" else direct
        benchmark.pedantic(work, setup=forget, rounds=15, warmup_rounds=2)
    note(benchmark, 1)


def note(benchmark, tokens: int) -> None:
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "shape": f"{tokens} tokens",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "tokens_per_s": tokens / seconds,
    }
