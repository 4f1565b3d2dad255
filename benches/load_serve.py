"""Load on a server of its own over loopback, and what is left of it afterwards: python benches/load_serve.py

Clients ask with and without pictures, streaming and not; some leave in the middle, some ask for nonsense. Every answer
is compared with what an engine says to the same request. Then memory, blocks of the cache, tasks and sockets are
compared with those before. At last the server gets SIGTERM under load: no request that it accepted may be lost.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
import torch
from PIL import Image

import llava_fast as lf
from llava_fast.pretrained import built_in

ROOT = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"
BAD = (b"{", b'{"messages": []}', b'{"messages": [{"role": "user", "content": "a"}], "n": 1000000}', b"\xff" * 1000)


@dataclass
class Counts:
    right: int = 0
    wrong: int = 0
    left: int = 0
    refused: int = 0
    turned_away: int = 0
    unanswered: list[str] = field(default_factory=list)
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
    sampling = lf.SamplingParams(max_tokens=tokens, ignore_eos=True)
    return body, lf.Request(messages=[{"role": "user", "content": parts}], sampling=sampling)


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

    def state(self) -> dict[str, float]:
        text = httpx.get(self.url + "/metrics").text

        def number(name: str) -> float:
            found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
            assert found, name
            return float(found[1])

        process = psutil.Process(self.process.pid)
        return {
            "memory_mb": round(process.memory_info().rss / 1e6, 1),
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
    number: int, server: Server, questions: list[Any], until: float, counts: Counts, closing: bool
) -> None:
    rng = random.Random(number)
    limits = httpx.Limits(max_keepalive_connections=0) if closing else httpx.Limits()
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        for turn in range(10**9):
            if time.monotonic() > until:
                return
            name, kind = f"c{number}-{turn}-{int(closing)}", rng.random()
            try:
                if not await ask(http, name, kind, *rng.choice(questions), rng.random() < 0.5, rng, counts):
                    return
            except httpx.HTTPError:
                counts.unanswered.append(name)
                if closing:
                    return


async def ask(
    http: httpx.AsyncClient, name: str, kind: float, body: dict, text: str, stream: bool, rng: Any, counts: Counts
) -> bool:
    """Returns whether the server takes more."""
    headers = {"content-type": "application/json", "x-request-id": name}
    if kind < 0.05:
        response = await http.post(CHAT, content=rng.choice(BAD), headers=headers)
        counts.refused += response.status_code == 400
        counts.turned_away += response.status_code == 503
        counts.wrong += response.status_code not in (400, 503)
        return response.status_code != 503
    began, first, found, whole = time.monotonic(), 0.0, "", False
    async with http.stream("POST", CHAT, json={**body, "stream": stream}, headers=headers) as response:
        if response.status_code == 503:
            counts.turned_away += 1
            return False
        if response.status_code != 200:
            counts.wrong += 1
            return True
        if stream:
            async for line in response.aiter_lines():
                first = first or time.monotonic() - began
                if kind < 0.15 and found:
                    counts.left += 1
                    return True
                whole = whole or line == "data: [DONE]"
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:]).get("choices", ()):
                        found += choice["delta"].get("content", "")
        else:
            found, whole = json.loads(await response.aread())["choices"][0]["message"]["content"], True
    counts.right += found == text and whole
    counts.wrong += found != text or not whole
    counts.seconds.append(time.monotonic() - began)
    if first:
        counts.first.append(first)
    return True


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [0.0] * 99
    return {"p50_ms": round(1000 * cuts[49], 1), "p99_ms": round(1000 * cuts[98], 1)}


async def load(server: Server, clients: int, seconds: float, questions: list[Any], closing: bool = False) -> Counts:
    counts, until = Counts(), time.monotonic() + seconds
    tasks = [asyncio.create_task(client(n, server, questions, until, counts, closing)) for n in range(clients)]
    if closing:
        await asyncio.sleep(seconds / 2)
        server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*tasks)
    return counts


def settled(server: Server, seconds: float = 15) -> dict[str, float]:
    """The server's state once nothing runs and idle connections are closed, or after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        state = server.state()
        if time.monotonic() > until or not (state["running"] or state["waiting"] or state["sockets"] > 1):
            return state
        time.sleep(0.2)


def measure(clients: int, seconds: float, kinds: int = 24) -> dict[str, Any]:
    questions = [asked(number) for number in range(kinds)]
    with lf.Engine(
        *lf.load(built_in(), dtype=torch.float32), lf.EngineConfig(kv_cache_bytes=1 << 24, max_sequences=16)
    ) as engine:
        texts = [c.outputs[0].text for c in engine.generate(request for _, request in questions)]
    pairs = [(body, text) for (body, _), text in zip(questions, texts, strict=True)]
    server = Server()
    try:
        asyncio.run(load(server, clients, min(5.0, seconds), pairs))  # caches and pools are filled
        before = settled(server)
        counts = asyncio.run(load(server, clients, seconds, pairs))
        after = settled(server)
        last = asyncio.run(load(server, clients, min(10.0, seconds), pairs, closing=True))
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
        "sigterm": {
            "answered": last.right,
            "turned_away": last.turned_away,
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
