"""Load on a server of its own over loopback, and what is left of it afterwards: python benches/load_serve.py

Clients ask with and without pictures, streaming and not; one in ten leaves in the middle, one in twenty asks for
nonsense. Every answer is compared with what an engine says to the same request when it has nothing else to do. Then
memory, blocks of the cache, tasks and sockets are compared with those before. At last the server gets SIGTERM under
load: no request that it accepted may be lost.

Each wrong answer is listed with its margin: by how much, in log-probability, the engine alone preferred its first
choice to its second where the two answers part. Sums over batches of other sizes differ by some 1e-6 in float32: a
margin of that size explains another answer, a larger one is a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
from PIL import Image

import llava_fast as lf
from llava_fast.generate.setup import Setup
from llava_fast.pretrained import built_in

ROOT = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"
BAD_SHARE, LEAVING_SHARE = 0.05, 0.1  # of what is asked
BAD = (b"{", b'{"messages": []}', b'{"messages": [{"role": "user", "content": "a"}], "n": 1000000}', b"\xff" * 1000)


@dataclass
class Question:
    """Attributes:
    body: what is sent.
    text: the answer of an engine that has nothing else to do.
    starts: that text after each of its tokens.
    margins: by token, log-probability of the likeliest less that of the second.
    """

    body: dict[str, Any]
    text: str
    starts: list[str]
    margins: list[float]

    def margin(self, found: str) -> float | None:
        """Of the first token that is not in ``found``; None where all of them are, and more."""
        pairs = zip(self.starts, self.margins, strict=True)
        return next((margin for start, margin in pairs if not found.startswith(start)), None)


@dataclass
class Counts:
    asked: int = 0
    right: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    refused: int = 0
    turned_away: int = 0
    unanswered: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def asked(number: int) -> tuple[dict[str, Any], lf.Request]:
    """A question, as a body and as a request of the engine. Greedy: one answer is right."""
    text = f"Question {number}: what is in the picture, and where?"
    data = picture(number) if number % 2 else None
    parts: list[Any] = [{"type": "text", "text": text}]
    body_parts, parts = list(parts), list(parts)
    if data:
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        body_parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        parts.insert(0, {"type": "image", "image": data})
    tokens = 8 + number * 5 % 40
    body = {"messages": [{"role": "user", "content": body_parts}], "max_tokens": tokens, "temperature": 0}
    body["ignore_eos"] = True
    sampling = lf.SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=2)
    return body, lf.Request(messages=[{"role": "user", "content": parts}], sampling=sampling)


def prepared(kinds: int) -> list[Question]:
    """Questions with their answers, by an engine like the server's, one at a time and with nothing cached."""
    config = lf.EngineConfig(kv_cache_bytes=1 << 24, max_sequences=1, prefix_caching=False)
    questions = []
    with Setup(model=str(built_in()), engine=config).open("cpu") as engine:
        for body, request in map(asked, range(kinds)):
            (output,) = engine.generate([request])[0].outputs
            decode, ids = engine.processor.decode, output.token_ids
            starts = [decode(ids[: n + 1]).rstrip("\ufffd").lstrip() for n in range(len(ids))]  # "\ufffd": cut in half
            margins = [score.top[0][1] - score.top[1][1] for score in output.logprobs]
            questions.append(Question(body, output.text, starts, margins))
    return questions


class Server:
    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        command = [sys.executable, "-m", "llava_fast.serve", "--port", "0", "--kv-cache-bytes", str(1 << 26)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            if line.startswith("ready: "):
                self.url = line.split()[1].rstrip("/")
                break
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self._reader.start()

    def memory_mb(self) -> float:
        return round(psutil.Process(self.process.pid).memory_info().rss / 1e6, 1)

    def state(self) -> dict[str, float]:
        text = httpx.get(self.url + "/metrics").text

        def number(name: str) -> float:
            found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
            assert found, name
            return float(found[1])

        process = psutil.Process(self.process.pid)
        return {
            "memory_mb": self.memory_mb(),
            "sockets": len([c for c in process.net_connections("tcp") if c.status != "LISTEN"]),
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "tasks": number("asyncio_tasks"),
            "running": number("llava_fast:num_requests_running"),
            "waiting": number("llava_fast:num_requests_waiting"),
            "cache_use": number("llava_fast:kv_cache_usage_perc"),
        }

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


async def client(
    number: int, server: Server, questions: list[Question], until: float, counts: Counts, tls: Any
) -> None:
    """Asks one thing after the other until it is late, or the server takes no more."""
    rng, turn = random.Random(number), 0
    async with httpx.AsyncClient(base_url=server.url, timeout=120, verify=tls) as http:
        while time.monotonic() < until:
            name, turn = f"c{number}-{turn}-{int(until)}", turn + 1
            counts.asked += 1
            try:
                kind = rng.random()
                if kind < BAD_SHARE:
                    more = await ask_nonsense(http, name, rng.choice(BAD), counts)
                else:
                    leaving = kind < BAD_SHARE + LEAVING_SHARE
                    more = await ask(http, name, rng.choice(questions), rng, leaving, counts)
            except httpx.HTTPError:
                counts.unanswered.append(name)
                return
            if not more:
                counts.turned_away += 1
                return


async def ask_nonsense(http: httpx.AsyncClient, name: str, body: bytes, counts: Counts) -> bool:
    """Returns whether the server takes more."""
    headers = {"content-type": "application/json", "x-request-id": name}
    response = await http.post(CHAT, content=body, headers=headers)
    counts.refused += response.status_code == 400
    if response.status_code not in (400, 503):
        counts.wrong.append({"nonsense": repr(body), "status": response.status_code})
    return response.status_code != 503


async def ask(
    http: httpx.AsyncClient, name: str, question: Question, rng: random.Random, leaving: bool, counts: Counts
) -> bool:
    """Returns whether the server takes more. Who is leaving goes after the first word, or after a moment."""
    stream = rng.random() < 0.5
    sent = {"json": {**question.body, "stream": stream}, "headers": {"x-request-id": name}}
    began, first, found, whole = time.monotonic(), 0.0, "", False
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(rng.uniform(0.0, 0.3) if leaving and not stream else None),
            http.stream("POST", CHAT, **sent) as response,
        ):
            if response.status_code == 503:
                return False
            async for piece, whole in pieces(response, stream):  # noqa: B007  (read below)
                first = first or time.monotonic() - began
                found += piece
                if leaving and found:
                    break
    if leaving and not whole:
        counts.left += 1
        return True
    if found == question.text and whole:
        counts.right += 1
    else:
        margin = question.margin(found)
        counts.wrong.append({"expected": question.text, "found": found, "whole": whole, "margin": margin})
    counts.seconds.append(time.monotonic() - began)
    if stream:
        counts.first.append(first)
    return True


async def pieces(response: httpx.Response, stream: bool) -> AsyncIterator[tuple[str, bool]]:
    """The text of an answer as it comes, and whether it is complete."""
    if response.status_code != 200 or not stream:
        body = json.loads(await response.aread())
        yield body["choices"][0]["message"]["content"] if "choices" in body else str(body), True
        return
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            yield (
                "".join(c["delta"].get("content", "") for c in event["choices"]) if "choices" in event else line,
                False,
            )
        elif line == "data: [DONE]":
            yield "", True


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [0.0] * 99
    return {"p50_ms": round(1000 * cuts[49], 1), "p99_ms": round(1000 * cuts[98], 1)}


async def load(
    server: Server, clients: int, seconds: float, questions: list[Question], end_at: float | None = None
) -> Counts:
    """Clients at work for so many seconds; ``end_at``: seconds after which the server gets SIGTERM."""
    counts, until = Counts(), time.monotonic() + seconds
    tls = ssl.create_default_context()  # one for all: a client makes its own in 40 ms, in which the others stand still
    tasks = [asyncio.create_task(client(n, server, questions, until, counts, tls)) for n in range(clients)]
    if end_at is not None:
        await asyncio.sleep(end_at)
        server.process.send_signal(signal.SIGTERM)
    while not all(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=seconds / 8)
        if end_at is None:
            counts.memory_mb.append(server.memory_mb())
    for task in tasks:
        task.result()
    return counts


def settled(server: Server, seconds: float = 20) -> dict[str, float]:
    """The server's state once nothing runs and idle connections are closed, or after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        state = server.state()
        if time.monotonic() > until or not (state["running"] or state["waiting"] or state["sockets"]):
            return state
        time.sleep(0.2)


def measure(clients: int, seconds: float, kinds: int = 24) -> dict[str, Any]:
    questions = prepared(kinds)
    server = Server()
    try:
        asyncio.run(load(server, clients, min(10.0, seconds), questions))  # caches and pools are filled
        before = settled(server)
        counts = asyncio.run(load(server, clients, seconds, questions))
        after = settled(server)
        last = asyncio.run(load(server, clients, min(10.0, seconds), questions, end_at=min(5.0, seconds / 2)))
        code = server.process.wait(90)
        server._reader.join()
        lines = [json.loads(line) for line in server.log if line.startswith("{")]
        accepted = {line["request_id"] for line in lines if line["status"] != 503}
        said = "socket.send() raised"  # asyncio, of a client that left
        errors = [line for line in server.log if not line.startswith(("{", said))]
    finally:
        server.end()
    return {
        "clients": clients,
        "seconds": seconds,
        "asked": counts.asked,
        "right": counts.right,
        "wrong": counts.wrong + last.wrong,
        "left_by_clients": counts.left,
        "refused": counts.refused,
        "unanswered": len(counts.unanswered),
        "requests_per_s": round(counts.right / seconds, 1),
        "whole": quantiles(counts.seconds),
        "first_event": quantiles(counts.first),
        "before": before,
        "after": after,
        "memory_mb_meanwhile": counts.memory_mb,
        "sigterm": {
            "answered": last.right,
            "left_by_clients": last.left,
            "turned_away": last.turned_away,
            "not_accepted": len(set(last.unanswered) - accepted),
            "lost": sorted(set(last.unanswered) & accepted),
            "exit_code": code,
        },
        "server_errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    print(json.dumps(measure(args.clients, args.seconds), indent=1))


if __name__ == "__main__":
    main()
