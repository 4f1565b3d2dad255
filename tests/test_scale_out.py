"""docs/nginx.conf and docs/Caddyfile run: two real servers behind the real balancer, where it is installed."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from openai import OpenAI

import llava_fast as lf
from llava_fast.pretrained import built_in
from llava_fast.serve import Settings, create_app
from tests.serve.conftest import serving, slowed, wait_for

DOCS = Path(__file__).parents[1] / "docs"
QUESTION = "How many shapes are there in this picture, and what colors do they have?"


class Cluster:
    """Attributes: balancer: nginx or caddy; url: its own; engines, servers: of the workers."""

    def __init__(self, balancer, url, engines, servers):
        self.balancer, self.url, self.engines, self.servers = balancer, url, engines, servers

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def worker(self, **headers) -> str:
        """Which worker a request with these headers comes to."""
        status, body = self.get("/v1/models", headers)
        assert status == 200
        return json.loads(body)["data"][0]["id"]

    def get(self, path, headers=None):
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@contextmanager
def started(command, port, log):
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            wait_for(lambda: process.poll() is not None or _listens(port))
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.terminate()


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def nginx(folder, ports):
    """The configuration as it is in the docs, but for its ports."""
    (folder / "llava_fast.conf").write_text(_with_ports("nginx.conf", ports).replace("listen ", "listen 127.0.0.1:"))
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in _TEMPORARY)
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}include {folder}/llava_fast.conf;\n}}\n"
    )
    return [_program("nginx"), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def caddy(folder, ports):
    options = "{\n\tadmin off\n\tauto_https off\n}\n"
    text = options + _with_ports("Caddyfile", ports).split("\n", 1)[1].replace(":", "http://127.0.0.1:", 1)
    (folder / "Caddyfile").write_text(text)
    return [_program("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def _with_ports(name, ports):
    text = (DOCS / name).read_text()
    for documented, real in zip((8000, 8001, 8002), ports, strict=True):
        assert str(documented) in text
        text = text.replace(str(documented), str(real))
    return text


def _program(name):
    return shutil.which(name) or shutil.which(name, path="/usr/sbin") or pytest.skip(f"{name} is not installed")


@contextmanager
def cluster(folder, balancer):
    _program(balancer.__name__)
    loaded = lf.load(built_in(), dtype=torch.float32)
    config = lf.EngineConfig(kv_cache_bytes=1 << 25, max_sequences=8)
    with (
        lf.Engine(*loaded, config) as one,
        lf.Engine(*loaded, config) as two,
        serving(create_app(one, Settings(model_name="one"))) as first,
        serving(create_app(two, Settings(model_name="two"))) as second,
    ):
        port = _free_port()
        ports = (port, urlsplit(first.url).port, urlsplit(second.url).port)
        with started(balancer(folder, ports), port, folder / "log"):
            yield Cluster(balancer, f"http://127.0.0.1:{port}", (one, two), (first, second))


@pytest.fixture(scope="module", params=[nginx, caddy])
def balanced(request, tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("balancer"), request.param) as made:
        yield made


def named(number):
    return {"X-Conversation-Id": f"conversation-{number}"}


def test_a_conversation_stays_with_its_worker_and_finds_its_prefix(balanced):
    workers = {number: balanced.worker(**named(number)) for number in range(24)}
    assert set(workers.values()) == {"one", "two"}
    assert all(balanced.worker(**named(number)) == worker for number, worker in workers.items())
    with balanced.client() as client:
        for number in (0, 1, 2, 3):
            ask = {"model": workers[number], "max_tokens": 4, "extra_headers": named(number), "temperature": 0}
            messages = [{"role": "user", "content": f"{number}: {QUESTION}"}]
            first = client.chat.completions.create(messages=messages, **ask)
            messages += [first.choices[0].message.model_dump(include={"role", "content"})]
            messages += [{"role": "user", "content": "And now?"}]
            second = client.chat.completions.create(messages=messages, **ask)
            assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 16 * 16


def test_text_streams_and_a_client_that_leaves_stops_its_answer(balanced):
    """The first piece is here while the engine is still at work; then the connection is cut."""
    worker = balanced.worker(**named(0))
    engine = balanced.engines[worker == "two"]
    cancelled = engine.stats().finished["cancelled"]
    with slowed(engine), balanced.client() as client:
        stream = client.completions.create(
            model=worker,
            prompt="Go on",
            max_tokens=900,
            stream=True,
            extra_headers=named(0),
            extra_body={"ignore_eos": True},
        )
        assert next(iter(stream)).choices
        assert engine.stats().running == 1
        stream.close()
    wait_for(lambda: engine.stats().running == 0)
    assert engine.stats().finished["cancelled"] == cancelled + 1


def test_too_large_a_body_never_comes_to_a_worker(balanced):
    connection = http.client.HTTPConnection(urlsplit(balanced.url).netloc, timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(40 << 20))
    connection.endheaders()
    try:
        for _ in range(40):
            connection.send(bytes(1 << 20))
    except OSError:
        pass  # it was refused before it was whole
    assert connection.getresponse().status == 413
    connection.close()


def test_health_is_passed_on_and_metrics_are_not(balanced):
    assert balanced.get("/health")[0] == 200
    assert balanced.get("/metrics")[0] == 404


def test_a_worker_that_drains_gets_nothing_new(balanced):
    """What would come to it goes to the other, and comes back afterwards."""
    mine = next(number for number in range(24) if balanced.worker(**named(number)) == "one")
    gate = balanced.servers[0].app.state.gate
    gate.draining = True
    try:
        if balanced.balancer is caddy:  # it learns of it from /health; nginx asks the other at once
            wait_for(lambda: balanced.worker(**named(mine)) == "two")
        with balanced.client() as client:
            for _ in range(6):
                client.chat.completions.create(
                    model="two",
                    messages=[{"role": "user", "content": QUESTION}],
                    max_tokens=2,
                    extra_headers=named(mine),
                )
    finally:
        gate.draining = False
    wait_for(lambda: balanced.worker(**named(mine)) == "one")


@pytest.mark.parametrize("balancer", [nginx, caddy])
def test_a_worker_that_is_gone_is_passed_over(balancer, tmp_path):
    """Nobody listens where the second worker should."""
    _program(balancer.__name__)
    port, nobody = _free_port(), _free_port()
    with (
        lf.Engine(*lf.load(built_in()), lf.EngineConfig(kv_cache_bytes=1 << 24, max_sequences=2)) as engine,
        serving(create_app(engine, Settings(model_name="one"))) as server,
        started(balancer(tmp_path, (port, urlsplit(server.url).port, nobody)), port, tmp_path / "log"),
    ):
        alone = Cluster(balancer, f"http://127.0.0.1:{port}", (engine,), (server,))
        assert {alone.worker(**named(number)) for number in range(12)} == {"one"}
