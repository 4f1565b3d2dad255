"""The real server over loopback, attacked: each attack gets its refusal, and honest clients notice nothing.

A probe asks for the version throughout, every 20 ms. How long it waited is reported at the end, by attack.
"""

# ruff: noqa: RUF001  (look-alike characters are what is tested)
from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("llava_fast.serve.app", reason="the server is not there")

from tests.generate.conftest import checkpoint  # noqa: F401  # a fixture
from tests.processor.test_image_file import COSTLY, encode
from tests.serve.attacked import MAX_BODY, MAX_IMAGES, MAX_PIXELS, SECONDS
from tests.serve.test_remote import TRICKS

KEY = "a-key-for-the-tests"
CHAT = "/v1/chat/completions"
MEMORY = 400 << 20  # bytes that the server's memory may rise by under all attacks together


class Probe:
    """Asks the server for its version, over and over; a wait of ten seconds counts as none at all."""

    def __init__(self, port: int):
        self.port, self.waits, self.attack = port, dict[str, list[float]](), "none"
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            began = time.perf_counter()
            try:
                status = talk(self.port, b"GET /version HTTP/1.1\r\nHost: x\r\n" + AUTH + CLOSE + b"\r\n", 10).status
            except OSError as error:
                status = repr(error)
            if status != 200:
                self.failed.append(f"{self.attack}: {status}")
            self.waits.setdefault(self.attack, []).append(time.perf_counter() - began)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class Said:
    """What a connection answered."""

    def __init__(self, raw: bytes):
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split(" ")[1]) if lines[0].startswith("HTTP/1.1 ") else 0
        self.headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        self.raw = raw

    @property
    def json(self) -> Any:
        return json.loads(self.body)


AUTH = f"Authorization: Bearer {KEY}\r\n".encode()
CLOSE = b"Connection: close\r\n"
JSON = b"Content-Type: application/json\r\n"


def talk(port: int, sent: bytes, seconds: float = 30) -> Said:
    """Everything that the server says to ``sent`` before it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it was all sent
            connection.sendall(sent)
        return Said(listen(connection))


def listen(connection: socket.socket) -> bytes:
    raw = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            raw += piece
    return raw


class Server:
    def __init__(self, model: Path):
        command = [sys.executable, "-m", "tests.serve.attacked", str(model), KEY]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.process = psutil.Process(self._process.pid)
        self.probe = Probe(self.port)

    def raw(self, sent: bytes, seconds: float = 30) -> Said:
        return talk(self.port, sent, seconds)

    def send(self, body: bytes, path: str = CHAT, headers: bytes = b"") -> Said:
        length = f"Content-Length: {len(body)}\r\n".encode()
        start = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
        return self.raw(start + AUTH + JSON + CLOSE + headers + length + b"\r\n" + body)

    def post(self, path: str = CHAT, **body: Any) -> Said:
        return self.send(json.dumps(body).encode(), path)

    def ask(self, *urls: str, text: str = "what is in this image", **more: Any) -> Said:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": text}]
        return self.post(messages=[{"role": "user", "content": content}], **{"max_tokens": 4, **more})

    def check_honest(self) -> None:
        """An ordinary question about a picture is answered."""
        said = self.ask(uri(encode("JPEG")))
        assert said.status == 200, said.raw
        assert said.json["usage"]["completion_tokens"] > 0
        assert said.json["usage"]["prompt_tokens_details"]["image_tokens"] > 0

    @property
    def connections(self) -> int:
        return sum(one.status == psutil.CONN_ESTABLISHED for one in self.process.net_connections("tcp"))

    def close(self) -> None:
        self.probe.stop()
        self._process.terminate()
        assert self._process.wait(30) in (0, -15)


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def running(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Server]:  # noqa: F811
    server = Server(checkpoint)
    server.check_honest()
    yield server
    server.close()
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        for attack, waits in sorted(server.probe.waits.items(), key=lambda item: -max(item[1]))[:12]:
            middle, longest = 1e3 * statistics.median(waits), 1e3 * max(waits)
            reporter.write_line(f"probe {middle:6.1f} ms median {longest:7.1f} ms longest of {len(waits):4d}  {attack}")
    assert not server.probe.failed


@pytest.fixture
def server(running: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The server; after the attack it answers an honest question and has let go of memory and connections."""
    before = running.process.memory_info().rss
    running.probe.attack = request.node.name
    yield running
    running.probe.attack = "none"
    assert running.process.is_running()
    running.check_honest()
    assert running.process.memory_info().rss - before < MEMORY
    deadline = time.monotonic() + 20
    while running.connections > 3:  # the probe's come and go
        assert time.monotonic() < deadline, f"{running.connections} connections are left"
        time.sleep(0.02)


def error_of(said: Said, *statuses: int) -> str:
    """The message of an error in OpenAI's form."""
    assert said.status in statuses, said.raw[:500]
    error = said.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for secret in ("Traceback", "0x7", "site-packages", "root:x:", "/home", ".py"):
        assert secret not in said.body.decode()
    return error["message"]


# ---- pictures from elsewhere


INSIDE = [
    "http://127.0.0.1:{0}/",
    "http://localhost:{0}/",
    "http://127.1:{0}/",
    "http://2130706433:{0}/",
    "http://0x7f000001:{0}/",
    "http://0177.0.0.1:{0}/",
    "http://0:{0}/",
    "http://0.0.0.0:{0}/",
    "http://[::1]:{0}/",
    "http://[::ffff:127.0.0.1]:{0}/",
    "http://[::]:{0}/",
    "http://127.0.0.1:{0}\\@example.com/",
    "http://example.com\\@127.0.0.1:{0}/",
    "http://example.com@127.0.0.1:{0}/",
    "http://127.0.0.1",
    "http://localhost/",
    "https://localhost/",
    "http://169.254.169.254/latest/meta-data/iam/",
    "http://[64:ff9b::127.0.0.1]/",
    "http://[2002:7f00:1::]/",
    "http://[fe80::1%25eth0]/",
    "http://10.0.0.1/",
    "http://192.168.0.1/",
    "http://１２７.0.0.1/",
]


def test_nothing_inside_is_fetched(server: Server):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0)
        for url in INSIDE:
            error_of(server.ask(url.format(trap.getsockname()[1])), 400)
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_urls_that_are_none(server: Server):
    needs_dns = ("http://user", "http://bob")  # none: those with a host that is looked up are left out
    for url in TRICKS:
        if "\ud800" in url or url.startswith(needs_dns):
            continue
        error_of(server.ask(url), 400)
    for url in (
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1:1/_x",
    ):
        assert "passwd" not in error_of(server.ask(url), 400)


# ---- pictures that are bombs


def test_costly_pictures(server: Server):
    for name, data in COSTLY.items():
        if len(data) * 4 / 3 < MAX_BODY - 1000:
            assert server.ask(uri(data)).status == 400, name


def test_pictures_of_too_many_pixels(server: Server):
    side = int(MAX_PIXELS**0.5)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        buffer = io.BytesIO()
        Image.new("L", (side + 1, side)).save(buffer, kind)
        assert "pixels" in error_of(server.ask(uri(buffer.getvalue())), 400)
    for width, height in ((2**31 - 1, 2**31 - 1), (65_535, 65_535), (1, 2**31 - 1), (0, 1)):
        bomb = bytearray(encode("PNG"))
        bomb[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        error_of(server.ask(uri(bytes(bomb))), 400)


def test_pictures_that_are_none(server: Server):
    good = encode("PNG")
    others = [b"", b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"%!PS", b"SIMPLE  =", b"PK\3\4"]
    for data in (*others, good[:20], good[:60], good[:-30], encode("TIFF"), encode("BMP")):
        error_of(server.ask(uri(data)), 400)
    for text in (
        "data:image/png;base64,%41",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        "data:,x",
    ):
        error_of(server.ask(text), 400)


def test_ten_thousand_tiny_pictures(server: Server):
    tiny = uri(encode("GIF", (1, 1), mode="L"))
    error_of(server.ask(*[tiny] * 10_000), 400, 413)
    error_of(server.ask(*[tiny] * (MAX_IMAGES + 1)), 400)


def test_a_picture_of_one_pixel(server: Server):
    for size in ((1, 1), (1, 5000), (5000, 1)):
        for kind in ("PNG", "JPEG", "WEBP", "GIF"):
            assert server.ask(uri(encode(kind, size))).status == 200


def test_random_damage(server: Server):
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = encode(kind)
        for _ in range(25):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 8):
                data[place] = rng.integers(256)
            assert server.ask(uri(bytes(data)), max_tokens=1).status in (200, 400)


# ---- bodies


DEEP = 100_000
BODIES = {
    "empty": b"",
    "spaces": b" " * 1000,
    "no json": b"{",
    "text": b"hello",
    "null": b"null",
    "number": b"1",
    "array": b"[]",
    "string": b'"x"',
    "single quotes": b"{'messages': []}",
    "trailing comma": b'{"messages": [],}',
    "two values": b'{"messages": []}{}',
    "comment": b'{"messages": [] /* x */}',
    "byte order mark": b'\xef\xbb\xbf{"messages": []}',
    "utf-16": '{"messages": []}'.encode("utf-16"),
    "invalid utf-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "overlong utf-8": b'{"messages": [{"role": "user", "content": "\xc0\xaf"}]}',
    "cut utf-8": b'{"messages": [{"role": "user", "content": "\xe2\x82"}]}',
    "utf-8 surrogate": b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "raw newline": b'{"messages": [{"role": "user", "content": "a\nb"}]}',
    "nested arrays": b"[" * DEEP + b"]" * DEEP,
    "nested arrays unclosed": b"[" * DEEP,
    "nested objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "nested in a field": b'{"messages": [], "metadata": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "nested many": b'{"messages": ' + b"[" * 900_000 + b"]" * 900_000 + b"}",
    "long number": b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 500_000 + b"}",
    "long exponent": b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999999999}',
    "nan": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "x"}], "top_p": Infinity}',
    "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(150_000)) + b"}",
    "many messages": b'{"messages": [' + b",".join([b'{"role":"user","content":"x"}'] * 30_000) + b"]}",
    "no messages": b'{"messages": []}',
    "unknown role": b'{"messages": [{"role": "tool", "content": "x"}]}',
    "content of a wrong type": b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
    "picture without url": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "picture of a number": b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}]}',
    "path as picture": b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}',
}  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize"])
def test_malformed_bodies(server: Server, path: str):
    for name, body in BODIES.items():
        said = server.send(body, path)
        assert said.status in (400, 413, 422), (name, said.raw[:300])
        error_of(said, 400, 413, 422)


def test_bodies_of_other_kinds(server: Server):
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"a/b"):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: " + kind + b"\r\nContent-Length: %d\r\n"
        assert server.raw(head % len(body) + AUTH + CLOSE + b"\r\n" + body).status in (400, 415)
    for coding in (b"gzip", b"br", b"deflate", b"x"):
        assert server.send(body, headers=b"Content-Encoding: " + coding + b"\r\n").status in (400, 415)


def start(path: str = CHAT, headers: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode() + AUTH + JSON + headers + b"\r\n"


def test_huge_bodies(server: Server):
    for told in (MAX_BODY + 1, 10**12, 10**30):
        assert server.raw(start(headers=b"Content-Length: %d\r\n" % told)).status in (400, 413)
    assert server.send(b'{"a": "' + b"x" * (MAX_BODY + 1) + b'"}').status == 413
    for piece in (b"x" * 65_536, b"{" * 65_536):
        chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
        assert server.raw(start(headers=b"Transfer-Encoding: chunked\r\n") + chunk * 80).status in (400, 413)


def test_chunked_bodies_of_tiny_chunks(server: Server):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 20_000}], "max_tokens": 1}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    said = server.raw(start(headers=b"Transfer-Encoding: chunked\r\n" + CLOSE) + chunks)
    assert said.status in (200, 400)  # a long prompt


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 10\r\nContent-Length: 11\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +10\r\n",
        b"Content-Length: 1e1\r\n",
        b"Content-Length: 0x10\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"X: a\r\n folded: b\r\n",
        b"X: a\0b\r\n",
        b"Host: y\r\n",
        b"\xff: x\r\n",
    ],
)
def test_heads_that_smuggle(server: Server, headers: bytes):
    said = server.raw(
        start(headers=headers) + b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n" + AUTH + CLOSE + b"\r\n"
    )
    assert said.status in (0, 400)
    assert b"HTTP/1.1 200" not in said.raw, said.raw[:600]


# ---- heads


def test_huge_heads(server: Server):
    get = b"GET /version HTTP/1.1\r\nHost: x\r\n" + AUTH
    for head in (
        get + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n",
        get + b"".join(b"X-%d: y\r\n" % i for i in range(50_000)) + b"\r\n",
        b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"G" * 1_000_000,
        get + b"Cookie: " + b"a=b; " * 100_000 + b"\r\n\r\n",
    ):
        assert server.raw(head).status in (0, 400, 413, 414, 431)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://127.0.0.1/ HTTP/1.1\r\n\r\n",
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n" + CLOSE + b"\r\n",
        b"GET /\r\n\r\n",
        b"\r\n\r\n\r\n\r\nGET\r\n\r\n",
        b"\0" * 100,
        b"TRACE / HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n",
        b"GET /../../../etc/passwd HTTP/1.1\r\nHost: x\r\n" + AUTH + CLOSE + b"\r\n",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n" + AUTH + CLOSE + b"\r\n",
        b"GET /static/..%2f..%2fetc/passwd HTTP/1.1\r\nHost: x\r\n" + AUTH + CLOSE + b"\r\n",
        b"GET //etc/passwd HTTP/1.1\r\nHost: x\r\n" + AUTH + CLOSE + b"\r\n",
        b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n" + AUTH + b"\r\n",
    ],
)
def test_what_is_no_request_of_this_api(server: Server, sent: bytes):
    said = server.raw(sent)
    assert said.status not in (101, 200), said.raw
    assert said.status < 500
    assert b"root:" not in said.raw


def test_request_ids_are_not_believed(server: Server):
    get = b"GET /version HTTP/1.1\r\nHost: x\r\n" + AUTH + CLOSE
    for given in (
        b"a\nSet-Cookie: x=y",
        b"a\rSet-Cookie: x=y",
        b"a\r\n Set-Cookie: x=y",
        b"<script>",
        b"x" * 5000,
        b"\xff",
        b'"}',
    ):
        said = server.raw(get + b"X-Request-Id: " + given + b"\r\n\r\n")
        names = [name for name, _ in said.headers]
        assert "set-cookie" not in names
        assert b"script" not in said.raw
        if said.status == 200:
            answered = dict(said.headers)["x-request-id"]
            assert answered.encode() != given
            assert len(answered) <= 128
    assert dict(server.raw(get + b"X-Request-Id: mine-1\r\n\r\n").headers)["x-request-id"] == "mine-1"


# ---- keys


ROUTES = ["/", "/v1/models", "/v1/models/x", "/version", "/metrics", "/tokenize", CHAT, "/v1/completions", "/docs"]


@pytest.mark.parametrize("method", [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"PATCH"])
def test_no_route_without_a_key(server: Server, method: bytes):
    keys = [b"", b"Authorization: \r\n", b"Authorization: Bearer\r\n", b"Authorization: Bearer \r\n"]
    keys += [b"Authorization: Bearer wrong-key-12345\r\n", b"Authorization: Bearer " + KEY[:-1].encode() + b"\r\n"]
    keys += [
        b"Authorization: " + KEY.encode() + b"\r\n",
        b"Authorization: Basic ####\r\n",
        b"Authorization: Bearer \xff\r\n",
    ]
    keys += [b"X-Api-Key: " + KEY.encode() + b"\r\n", b"Cookie: key=" + KEY.encode() + b"\r\n"]
    for number, key in enumerate(keys):
        for route in ROUTES if number < 2 else (CHAT,):
            for path in (
                route,
                route + "/",
                "//" + route.strip("/"),
                route + "?key=" + KEY,
                "/%76" + route[2:],
                "/health/.." + route,
            ):
                said = server.raw(method + b" " + path.encode() + b" HTTP/1.1\r\nHost: x\r\n" + key + CLOSE + b"\r\n")
                assert said.status == 401, (path, key, said.raw)  # not 404: nothing is told of what there is
    assert server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n").status == 200


def test_pages_of_other_origins_may_not_read(server: Server):
    for origin in (b"https://evil.test", b"null", b"http://127.0.0.1"):
        said = server.raw(b"GET /version HTTP/1.1\r\nHost: x\r\nOrigin: " + origin + b"\r\n" + AUTH + CLOSE + b"\r\n")
        assert not [name for name, _ in said.headers if name.startswith("access-control")]


# ---- settings out of all proportion


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 1_000_000},
        {"n": 0},
        {"n": -1},
        {"n": 2**70},
        {"max_tokens": 10**9},
        {"max_tokens": -1},
        {"max_completion_tokens": 2**63},
        {"logprobs": True, "top_logprobs": 10**6},
        {"temperature": -1},
        {"temperature": 1e300},
        {"top_p": 0},
        {"top_k": 2**80},
        {"repetition_penalty": 0},
        {"seed": 2**100},
        {"stop": ["x"] * 50_000},
        {"stop": "x" * 1_000_000},
        {"stop": ""},
        {"stop_token_ids": list(range(60_000))},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [10**9]},
        {"logit_bias": {str(i): 1 for i in range(60_000)}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"0": 1e300}},
        {"priority": 1},
        {"priority": -(10**30)},
        {"model": "x" * 100_000},
        {"cache_salt": "x" * 100_000},
        {"__class__": "x"},
        {"chat_template": "{{ ''.__class__ }}"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+$"}}}},
    ],
)
def test_settings_out_of_proportion(server: Server, settings: dict[str, Any]):
    error_of(server.ask(**settings), 400, 404, 413, 422)


def test_prompts_out_of_proportion(server: Server):
    error_of(server.ask(text="x " * 1_000_000), 400, 413)
    error_of(server.post("/v1/completions", prompt=["x"] * 20_000), 400)
    error_of(server.post("/v1/completions", prompt=[10**9]), 400)
    error_of(server.post("/v1/completions", prompt=[-1]), 400)
    error_of(server.post("/v1/completions", prompt=[[1, 2]] * 20_000), 400)


# ---- text that is no markup


SPECIALS = (
    "<image> <s> </s> <unk> <pad> <im_start> <im_end> <|im_start|> <0x0A> [INST] <<SYS>> USER: ASSISTANT: <image>"
)


def test_special_tokens_in_text_are_text(server: Server):
    plain = server.post("/tokenize", prompt=SPECIALS, add_special_tokens=False).json["tokens"]
    ends = server.post("/tokenize", prompt="", add_special_tokens=True).json["tokens"]
    assert not set(plain) & {0, 1, 2, *ends}
    assert len(plain) > len(SPECIALS.split())
    for said in (
        server.ask(text=SPECIALS),
        server.post("/v1/completions", prompt=SPECIALS, max_tokens=2),
        server.post(
            messages=[{"role": "system", "content": SPECIALS}, {"role": "user", "content": SPECIALS}], max_tokens=2
        ),
    ):
        assert said.status == 200
        assert said.json["usage"]["prompt_tokens_details"]["image_tokens"] == 0
        assert said.json["usage"]["prompt_tokens"] >= len(plain)


# ---- slow clients


def held(server: Server, sent: bytes, number: int = 100, **options: int) -> list[socket.socket]:
    connections = []
    for _ in range(number):
        connection = socket.socket()
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(sent)
        connections.append(connection)
    return connections


def drip(connections: list[socket.socket], piece: bytes) -> list[bytes]:
    """Sends a piece ten times a second until the server has closed every connection; what it said on each."""
    said = [b""] * len(connections)
    open_ones = dict(enumerate(connections))
    deadline = time.monotonic() + 20
    while open_ones:
        assert time.monotonic() < deadline, f"{len(open_ones)} connections are still open"
        time.sleep(SECONDS / 10)
        for number, connection in list(open_ones.items()):
            try:
                connection.setblocking(True)
                connection.send(piece)
                connection.setblocking(False)
                found = connection.recv(1 << 16)
                said[number] += found
                closed = not found
            except BlockingIOError:
                closed = False
            except OSError:
                closed = True
            if closed:
                connection.close()
                del open_ones[number]
    return said


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: "])
def test_slow_heads(server: Server, sent: bytes):
    connections = held(server, sent)
    server.check_honest()
    assert set(drip(connections, b"X: y\r\n" if sent.endswith(b"\n") else b"y")) == {b""}


def test_slow_heads_after_a_request(server: Server):
    get = b"GET /version HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\n"
    connections = held(server, get + b"GET /version HTTP/1.1\r\nX: ", 50)
    assert all(said.count(b"HTTP/1.1 200") == 1 for said in drip(connections, b"y"))


@pytest.mark.parametrize("headers", [b"Content-Length: 100000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_slow_bodies(server: Server, headers: bytes):
    connections = held(server, start(headers=headers))
    server.check_honest()
    said = drip(connections, b"1\r\n \r\n" if b"chunked" in headers else b" ")
    assert {Said(one).status for one in said} == {408}  # and each of them could read it


def test_slow_readers(server: Server):
    """Streams that nobody reads, with more in them than the system's buffers hold."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "n": 8,
            "ignore_eos": True,
            "max_tokens": 400,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ).encode()
    connections = held(server, start(headers=b"Content-Length: %d\r\n" % len(body)) + body, 2, SO_RCVBUF=4096)
    ports = {connection.getsockname()[1] for connection in connections}
    for connection in connections:
        assert connection.recv(12) == b"HTTP/1.1 200"
    server.check_honest()
    deadline = time.monotonic() + 30
    while ports & {one.raddr.port for one in server.process.net_connections("tcp") if one.raddr}:
        assert time.monotonic() < deadline, "a connection is left"
        time.sleep(0.02)
    for connection in connections:
        connection.close()


def test_clients_that_leave(server: Server):
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}).encode()
    whole = start(headers=b"Content-Length: %d\r\n" % len(body)) + body
    for length in (*range(1, len(whole), 37), len(whole)):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(whole[:length])
            if length % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset


def test_idle_connections(server: Server):
    connections = held(server, b"", 300)
    server.check_honest()
    for connection in connections:
        connection.close()


# ---- many at once


def test_a_crowd_of_bad_and_good(server: Server):
    """Sixteen attackers at once, each with another attack, and honest clients among them."""
    bomb, wrong, tiny = uri(COSTLY["jpeg exif"]), uri(b"nothing"), [uri(encode("GIF", (1, 1), mode="L"))] * 2000
    attacks = [
        lambda: server.ask(bomb),
        lambda: server.ask(wrong),
        lambda: server.ask(*tiny),
        lambda: server.ask(n=1_000_000),
        lambda: server.send(BODIES["nested many"]),
        lambda: server.send(BODIES["many keys"]),
        lambda: server.send(b"x" * (MAX_BODY - 10)),
        lambda: server.ask("http://127.0.0.1/"),
    ]
    statuses: list[int] = []
    honest: list[int] = []

    def attack(number: int) -> None:
        for turn in range(4):
            statuses.append(attacks[(number + turn) % len(attacks)]().status)

    def ask() -> None:
        honest.extend(server.ask(uri(encode("PNG"))).status for _ in range(4))

    threads = [threading.Thread(target=attack, args=(i,)) for i in range(16)] + [threading.Thread(target=ask)] * 1
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {400, 408, 413}  # 408: on a busy machine a body of that size may come too late
    assert honest == [200] * 4
