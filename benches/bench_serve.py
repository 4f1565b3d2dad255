"""The server beside the bare engine: the same requests to the same engine, over HTTP on loopback and without.

Two figures: many requests at once (tokens a second), and one request's first token. The server runs in a thread of this
process, and its clients in a process of their own where there are many, so that their work is not counted as its.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import threading
import time
from multiprocessing.connection import Connection
from urllib.parse import SplitResult, urlsplit

import numpy as np
import pytest
import torch
import torch.multiprocessing
import uvicorn
from PIL import Image

import llava_fast as lf
from benches.bench_engine import SHAPES, TOKENIZER
from llava_fast.serve import create_app

TOKENS, COUNT = 48, 32
CHAT = "/v1/chat/completions"


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


async def stream(url: SplitResult, body: bytes, first_only: bool = False) -> str:
    """The text of a streamed answer, read with little work of the client's own, which is not what is measured. The
    server sends whole events, so that a line of the body that begins with "data: " is one."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {url.hostname}\r\nContent-Type: application/json\r\n"
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


def clients(pipe: Connection, url: str, bodies: list[bytes]) -> None:
    """In a process of their own: asks everything at once whenever it is told to, and sends back the texts."""

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(stream(urlsplit(url), body) for body in bodies))

    while pipe.recv():
        pipe.send(asyncio.run(all_at_once()))


@pytest.mark.parametrize("impl", ["engine", "server"])
def test_many_requests(benchmark, served, impl):
    name, engine, url = served
    if benchmark.disabled and impl == "engine":
        pytest.skip("with nothing to time, the check beside the server is the same")
    benchmark.group = f"serve, {name}: {COUNT} requests at once, one picture each"
    count, tokens = (COUNT, TOKENS) if benchmark.enabled else (2, 2)
    pairs = [asked(number, tokens) for number in range(count)]
    context = torch.multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=clients, args=(theirs, url, [body for _, body in pairs]))
    process.start()

    def over_http() -> list[str]:
        pipe.send(True)
        return pipe.recv()

    def direct() -> list[str]:
        return [completion.outputs[0].text for completion in engine.generate(request for request, _ in pairs)]

    try:
        assert over_http() == direct() or engine._model.dtype != torch.float32  # bfloat16 varies with the batch
        work = over_http if impl == "server" else direct
        benchmark.pedantic(work, setup=engine.clear_caches, rounds=5, warmup_rounds=1)
    finally:
        pipe.send(False)
        process.join()
    note(benchmark, count * tokens)


@pytest.mark.parametrize("impl", ["engine", "server"])
def test_first_token(benchmark, served, impl):
    name, engine, url = served
    benchmark.group = f"serve, {name}: first token, one picture"
    request, body = asked(1000, 16)
    loop = asyncio.new_event_loop()

    def over_http() -> str:
        return loop.run_until_complete(stream(urlsplit(url), body, first_only=True))

    def direct() -> str:
        with engine.submit(request) as handle:
            return next((delta.text for delta in handle if delta.text), "")  # random weights may say nothing

    def forget() -> None:
        while engine.stats().running:
            time.sleep(0.001)
        engine.clear_caches()

    # A chunk may have more than one token in it.
    texts = sorted((over_http(), direct()), key=len)
    assert texts[1].startswith(texts[0]) or engine._model.dtype != torch.float32
    benchmark.pedantic({"server": over_http, "engine": direct}[impl], setup=forget, rounds=15, warmup_rounds=2)
    loop.close()
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
