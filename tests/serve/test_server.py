"""The server around the answers: clients that leave, keys, limits, logs, hooks, mounting, and its end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings

import llava_fast as lf
from llava_fast.errors import ConfigError
from llava_fast.generate.setup import Setup
from llava_fast.serve import Settings, create_app
from llava_fast.serve.__main__ import main as command_line
from tests.serve.conftest import KEY, png, serving, slowed, user, wait_for

LONG = {"messages": user("Hi"), "max_tokens": 900, "temperature": 0, "ignore_eos": True}
SHORT = {"messages": user("Hi"), "max_tokens": 2, "temperature": 0}
CHAT = "/v1/chat/completions"


@pytest.fixture
def patient(loaded):
    """An engine of one place, so that what holds it is seen."""
    with lf.Engine(*loaded, lf.EngineConfig(kv_cache_bytes=1 << 24, max_sequences=1, prefix_caching=False)) as engine:
        yield engine


def idle(engine: lf.Engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == stats.blocks_held == 0


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect(patient, stream):
    with serving(create_app(patient)) as server, slowed(patient):
        body = json.dumps({**LONG, "stream": stream}).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: patient.stats().generated_tokens > 2)
        wait_for(lambda: idle(patient))
        assert patient.stats().finished["cancelled"] == 1 and patient.stats().generated_tokens < 900
        assert httpx.post(server.url + CHAT, json=SHORT).status_code == 200
        gate = server.app.state.gate
        wait_for(lambda: gate.running == 0 and not gate.handles)  # a client has its answer a moment before


def test_keys(engine):
    app = create_app(engine, Settings(model_name="tiny", api_keys=("another-key-of-tests", KEY)))
    with serving(app) as server, httpx.Client(base_url=server.url) as http:
        paths = set(app.openapi()["paths"]) | {"/", "/openapi.json", "/nothing"}
        for path in paths - {"/health"}:
            for headers in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": f"bearer  {KEY}x"}):
                for method in ("GET", "POST"):
                    response = http.request(method, path, headers=headers)
                    assert response.status_code == 401, (method, path)
                    assert response.json()["error"]["code"] == "invalid_api_key" and KEY not in response.text
        assert http.get("/health").status_code == 200
        with server.client(KEY) as client:
            assert client.chat.completions.create(model="tiny", messages=user("Hi"), max_tokens=2)
        with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_tenants_share_no_cache(engine):
    """How fast an answer comes, and what usage says of it, tells nobody what others have sent."""
    keys = ("the-key-of-one-tenant", "the-key-of-another")
    body = {"messages": user(png(99), "What is it, and where is it? " * 4), "max_tokens": 2}
    with serving(create_app(engine, Settings(api_keys=keys))) as server:

        def cached(key: str, **more: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            made = httpx.post(server.url + CHAT, json={**body, **more}, headers=headers).json()
            return made["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached(keys[0]) == 0 < cached(keys[0])
        assert cached(keys[1]) == 0 < cached(keys[1])
        assert cached(keys[0], cache_salt="project") == 0 < cached(keys[0], cache_salt="project")


def test_bodies_of_all_requests_together(engine):
    with serving(create_app(engine, Settings(max_total_bytes=100_000))) as server:
        gate = server.app.state.gate
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as slow:
            slow.sendall(head.encode() + b" " * 80_000)
            wait_for(lambda: gate.held_bytes == 80_000)
            refused = httpx.post(server.url + CHAT, json={**SHORT, "user": "x" * 40_000})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert httpx.post(server.url + CHAT, json=SHORT).status_code == 200
        wait_for(lambda: gate.held_bytes == 0)
        assert httpx.post(server.url + CHAT, json={**SHORT, "user": "x" * 40_000}).status_code == 200


def test_settings_are_judged():
    for wrong in ({"api_keys": ("short",)}, {"max_images": -1}, {"body_seconds": 0}, {"image_formats": ("EXE",)}):
        with pytest.raises(ConfigError):
            Settings(**wrong)


@pytest.mark.parametrize("told", [True, False])
def test_large_bodies_are_refused_while_read(engine, told):
    with serving(create_app(engine, Settings(max_body_bytes=10_000))) as server:
        body = json.dumps({**SHORT, "user": "x" * 20_000}).encode()
        content = body if told else (body[at : at + 500] for at in range(0, len(body), 500))
        headers = {"content-type": "application/json"}
        response = httpx.post(server.url + CHAT, content=content, headers=headers)
        assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"
        wait_for(lambda: server.app.state.gate.held_bytes == 0)  # the answer is out before its request has ended
        assert httpx.post(server.url + CHAT, json=SHORT).status_code == 200


def test_bodies(server):
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b'"text"', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[" * 300_000, "application/json", 413),
        (json.dumps(SHORT).encode(), "text/plain", 415),
    ):
        response = httpx.post(server.url + CHAT, content=content, headers={"content-type": kind})
        assert response.status_code == status and response.json()["error"]["message"]


def test_too_many_at_once(patient):
    app = create_app(patient, Settings(max_concurrent=1))
    with serving(app) as server, slowed(patient, 0.001), ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, server.url + CHAT, json=LONG, timeout=60)
        wait_for(lambda: server.app.state.gate.running == 1)
        refused = httpx.post(server.url + CHAT, json=SHORT, timeout=60)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        health = httpx.get(server.url + "/health", timeout=60)
        assert health.status_code == 200  # it waits for its token, or sees others made
        assert first.result().status_code == 200
        wait_for(lambda: server.app.state.gate.running == 0)
        assert httpx.post(server.url + CHAT, json=SHORT, timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_time_for_one_request(patient, stream):
    with serving(create_app(patient, Settings(request_seconds=0.2))) as server, slowed(patient, 0.001):
        patient.generate([lf.Request(token_ids=[1])])
        response = httpx.post(server.url + CHAT, json={**LONG, "stream": stream}, timeout=30)
        if response.status_code == 200:  # the stream had begun
            *_, last = response.text.strip().split("\n\n")
            assert stream and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        assert idle(patient)


def test_request_ids_and_access_log(server, caplog):
    logger = logging.getLogger("llava_fast.serve.access")
    with caplog.at_level(logging.INFO, logger.name):
        sent = {"x-request-id": "mine.1-a"}
        assert httpx.post(server.url + CHAT, json=SHORT, headers=sent).headers["x-request-id"] == "mine.1-a"
        for wrong in ("a b", "x" * 129, '"}{'):
            found = httpx.get(server.url + "/version", headers={"x-request-id": wrong}).headers["x-request-id"]
            assert found.startswith("req-")
        wait_for(lambda: len(caplog.records) >= 4)
    line = json.loads(caplog.records[0].message)
    assert line["request_id"] == "mine.1-a" and line["status"] == 200 and line["path"] == CHAT
    assert line["completion_tokens"] == 2 and line["ms"] > 0 and "Hi" not in caplog.records[0].message


def test_mounted_under_a_prefix(engine):
    outer = FastAPI()
    outer.mount("/llava", create_app(engine, Settings(model_name="tiny", api_keys=(KEY,))))
    with serving(outer, "/llava") as server, server.client(KEY) as client:
        assert client.chat.completions.create(model="tiny", messages=user(png(), "Hi"), max_tokens=2).choices
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/version").status_code == 401
        page = httpx.get(server.url + "/", headers={"authorization": f"Bearer {KEY}"})
        assert page.status_code == 200 and page.headers["content-security-policy"]
        assert httpx.get(server.url.removesuffix("/llava") + "/health").status_code == 404


def test_health_fails_with_the_engine(loaded):
    with (
        lf.Engine(*loaded, lf.EngineConfig(kv_cache_bytes=1 << 24, max_sequences=1)) as engine,
        serving(create_app(engine, Settings(health_age_seconds=0))) as server,
    ):
        before = engine.stats().generated_tokens
        assert httpx.get(server.url + "/health").status_code == 200
        assert engine.stats().generated_tokens == before + 1
        engine.close()
        wrong = httpx.get(server.url + "/health")
        assert wrong.status_code == 503 and wrong.json()["error"]["code"] == "unhealthy"
        assert httpx.post(server.url + CHAT, json=SHORT).status_code == 503


def test_metrics(server):
    def read() -> dict[str, float]:
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = read()
    made = httpx.post(server.url + CHAT, json=SHORT).json()
    after = read()
    of = '{model_name="tiny"}'

    def rise(name: str) -> float:
        return after["llava_fast:" + name] - before.get("llava_fast:" + name, 0)

    assert rise("generation_tokens_total" + of) == made["usage"]["completion_tokens"] == 2
    assert rise("prompt_tokens_total" + of) == made["usage"]["prompt_tokens"]
    assert rise("time_to_first_token_seconds_count" + of) == 1
    assert rise('request_success_total{finished_reason="length",model_name="tiny"}') == 1
    assert after["llava_fast:num_requests_running" + of] == 0


def test_cors_is_off_unless_asked_for(engine, server):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert not [h for h in httpx.options(server.url + CHAT, headers=ask).headers if h.startswith("access-control")]
    allowed = Settings(api_keys=(KEY,), cors_origins=("https://a.example",))
    with serving(create_app(engine, allowed)) as open_server:
        found = httpx.options(open_server.url + CHAT, headers=ask)
        assert found.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(open_server.url + CHAT, headers={**ask, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_conversations_and_moderation(engine, tmp_path):
    seen = []

    async def moderate(messages):
        seen.append(messages)
        if "broken" in str(messages):
            raise RuntimeError("a secret of the hook")
        return "no greetings" if "hello" in str(messages) else None

    path = tmp_path / "log.jsonl"
    picture = png()
    with serving(create_app(engine, Settings(conversations=path, moderate=moderate))) as server:
        assert httpx.post(server.url + CHAT, json={**SHORT, "messages": user(picture, "Hi")}).status_code == 200
        refused = httpx.post(server.url + CHAT, json={**SHORT, "messages": user("hello")})
        assert refused.status_code == 400 and "no greetings" in refused.json()["error"]["message"]
        failed = httpx.post(server.url + CHAT, json={**SHORT, "messages": user("broken")})
        assert failed.status_code == 500 and "secret" not in failed.text
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "hello"}).status_code == 400
    assert seen[0][0]["content"][0]["image"] == picture
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (
        row["asked"][0]["content"][0]["image"].startswith("sha256:") and row["asked"][0]["content"][1]["text"] == "Hi"
    )
    assert row["answers"][0]["finish_reason"] == "length"


def test_event_loop_is_free_while_large_requests_are_read(server):
    """Large bodies beside small ones: every small one is answered, none waits for all of the large ones."""
    large = {**SHORT, "messages": user(*[png(n, (450, 450)) for n in range(3)], "Hi")}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(httpx.post, server.url + CHAT, json=large, timeout=60) for _ in range(8)]
        while not all(one.done() for one in asked):
            assert httpx.get(server.url + "/version", timeout=5).status_code == 200
        assert [one.result().status_code for one in asked] == [200] * 8


def test_schemathesis(server):
    """Requests made up from the app's own document: no server error, and every refusal in OpenAI's shape."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            nonlocal count
            count += 1
            if isinstance(case.body, dict):
                case.body["max_tokens"] = 2
            response = case.call(timeout=30)
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            assert response.status_code == 200 or set(response.json()) == {"error"}

        given(case=operation.as_strategy())(ask)()
    assert count > 60
    assert httpx.post(server.url + CHAT, json=SHORT).status_code == 200


class Process:
    """The command line in a process of its own."""

    def __init__(self, *options: str, **environment: str):
        root = Path(__file__).parents[2]
        env = {
            **os.environ,
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [
            sys.executable,
            "-m",
            "llava_fast",
            "serve",
            "--port",
            "0",
            "--kv-cache-bytes",
            str(1 << 25),
            *options,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env, text=True)
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("ready: "):
                break
        self.url = self.lines[-1].split()[1].rstrip("/")
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()


def test_drain_under_sigterm():
    """Running requests are finished, new ones told to come back, and then the server ends by itself."""
    with Process() as server, ThreadPoolExecutor(4) as pool:
        stream = {**LONG, "stream": True}
        running = [pool.submit(httpx.post, server.url + CHAT, json=b, timeout=60) for b in (LONG, stream, LONG)]
        of = '{model_name="llava-fast-built-in"}'
        wait_for(lambda: f"num_requests_running{of} 3.0" in httpx.get(server.url + "/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(server.url + "/health").status_code == 503)
        refused = httpx.post(server.url + CHAT, json=SHORT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "shutting_down"
        answers = [one.result() for one in running]
        assert [answer.status_code for answer in answers] == [200] * 3
        whole = [json.loads(answer.text) for answer in (answers[0], answers[2])]
        assert [one["choices"][0]["finish_reason"] for one in whole] == ["length"] * 2
        assert answers[1].text.endswith("data: [DONE]\n\n")
        assert server.process.wait(30) == 0
    line = json.loads(next(line for line in server.lines if CHAT in line))
    assert line["method"] == "POST"


def test_drain_has_an_end():
    with Process("--drain-seconds", "0.1", LLAVA_FAST_API_KEYS=KEY) as server, ThreadPoolExecutor(1) as pool:
        headers = {"authorization": f"Bearer {KEY}"}
        body = {**LONG, "n": 8}
        running = pool.submit(httpx.post, server.url + CHAT, json=body, headers=headers, timeout=60)
        of = '{model_name="llava-fast-built-in"}'
        wait_for(lambda: f"_running{of} 8.0" in httpx.get(server.url + "/metrics", headers=headers).text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert running.result().status_code == 503


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "{taken}"], "cannot listen on 127.0.0.1 port {taken} (Address already in use); choose another"),
        (["--port", "65536"], "--port 65536 is not between 0 and 65535"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1 port 8000"),
        (["--max-n", "0"], "max_n=0 must be above 0"),
        (["--moderate", "nowhere:f"], "write it as package.module:function"),
        (["--api-key-file", "{empty}"], "holds no key"),
        (["--remote-host", "http://x"], "is no host"),
    ],
)
def test_errors_before_the_model_is_loaded(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Setup, "open", lambda *_: pytest.fail("the model is loaded"))
    (tmp_path / "empty").touch()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        known = {"taken": listening.getsockname()[1], "empty": tmp_path / "empty"}
        assert command_line([option.format(**known) for option in options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message.format(**known) in said and said.count("\n") == 1


def test_missing_extra():
    code = "import sys; sys.modules['fastapi'] = None; from llava_fast.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "serve"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: fastapi is missing: pip install 'llava-fast[serve]'\n"


def test_engine_stays_the_callers(engine):
    with serving(create_app(engine)) as server:
        assert httpx.get(server.url + "/health").status_code == 200
    assert engine.generate([lf.Request(token_ids=[1])])[0].error is None
