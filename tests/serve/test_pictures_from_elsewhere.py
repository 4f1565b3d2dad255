"""Pictures at addresses through the whole app, and clients that leave before their answer has begun.

The names are made up and every address that is dialled leads to one server on loopback.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore2
import httpx2 as httpx
import pytest

import llava_fast as lf
from llava_fast.serve import Settings, create_app, remote
from llava_fast.serve.remote import RemotePolicy
from tests.serve.conftest import engine_messages, image_part, png, serving, wait_for
from tests.serve.test_remote import PUBLIC, PUBLIC_2
from tests.serve.web import Names

CHAT = "/v1/chat/completions"


class Elsewhere(BaseHTTPRequestHandler):
    """/1.png and so on, but /0.png does not come; /away redirects to the server's own loopback, /moved to a name."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path in ("/away", "/moved"):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/" if self.path == "/away" else "http://b.test/2.png")
            return self.end_headers()
        data = (
            b"<html>" if self.path == "/page" else b"no picture" if self.path == "/odd" else png(int(self.path[1:-4]))
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path == "/page" else "image/png")
        if self.path == "/0.png":
            self.end_headers()
            self.server.left.wait(30)
            return None
        self.end_headers()
        return self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def elsewhere(monkeypatch):
    """The server of pictures; ``asked``: paths; ``dialled``: addresses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    server.asked, server.dialled, server.left = [], [], threading.Event()

    class Network(httpcore2.AnyIOBackend):
        async def connect_tcp(self, host, port, *more, **options):
            server.dialled.append((host, port))
            return await super().connect_tcp("127.0.0.1", server.server_port, *more, **options)

    server.names = Names(a_test=[PUBLIC], b_test=[PUBLIC_2], inside_test=["10.1.2.3"], half_test=[PUBLIC, "127.0.0.1"])
    monkeypatch.setattr(remote, "_resolve", server.names)
    monkeypatch.setattr(httpcore2, "AnyIOBackend", Network)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.left.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def open_server(engine):
    with serving(create_app(engine, Settings(remote=RemotePolicy(allow="public", timeout=20)))) as server:
        yield server


def asking(*urls: str, text: str = "What is it?", **more):
    parts = [
        image_part(url) if isinstance(url, bytes) else {"type": "image_url", "image_url": {"url": url}} for url in urls
    ]
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": 8,
        "temperature": 0,
        **more,
    }


def test_pictures_come_in_their_order_from_checked_addresses(open_server, elsewhere, engine):
    body = asking("http://a.test/1.png", png(7), "http://b.test/2.png", "http://a.test/moved")
    found = httpx.post(open_server.url + CHAT, json=body, timeout=60)
    messages = engine_messages(png(1), png(7), png(2), png(2), "What is it?")
    expected = engine.generate([lf.Request(messages=messages, sampling=lf.SamplingParams(max_tokens=8))])[0]
    assert found.json()["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert sorted(elsewhere.dialled) == sorted([(PUBLIC, 80), (PUBLIC_2, 80), (PUBLIC, 80), (PUBLIC_2, 80)])
    assert sorted(elsewhere.asked) == ["/1.png", "/2.png", "/2.png", "/moved"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://inside.test/1.png", "no address that pictures may be fetched from"),
        ("http://half.test/1.png", "no address that pictures may be fetched from"),
        ("http://nowhere.test/1.png", "no address that pictures may be fetched from"),
        ("http://127.0.0.1/1.png", "no address that pictures may be fetched from"),
        ("http://a.test:8080/1.png", "only from hosts that this server allows"),
        ("http://a.test/away", "no address that pictures may be fetched from"),
        ("http://a.test/page", "not to a picture"),
        ("http://a.test/odd", "not an image"),
    ],
)
def test_refusals(open_server, elsewhere, url, words):
    found = httpx.post(open_server.url + CHAT, json=asking(png(), url), timeout=60)
    assert found.status_code == 400
    error = found.json()["error"]
    assert (
        error["code"] == "invalid_image" and error["message"].startswith("image 2 of 2: ") and words in error["message"]
    )
    assert "10.1.2.3" not in found.text and PUBLIC not in found.text
    assert not {address for address, _ in elsewhere.dialled} - {PUBLIC}


def leave(server, body) -> socket.socket:
    """A connection on which the body was sent, to be closed."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall(head.encode() + data)
    return connection


def test_a_client_that_leaves_while_its_picture_is_fetched(open_server, elsewhere, engine):
    before = engine.stats()
    with leave(open_server, asking("http://a.test/0.png")):
        wait_for(lambda: elsewhere.asked)
        assert open_server.app.state.gate.running == 1
    wait_for(lambda: open_server.app.state.gate.running == 0, 10)  # the policy's own time is 20 s
    assert engine.stats().generated_tokens == before.generated_tokens


def test_a_client_that_leaves_while_it_is_moderated(engine):
    begun, cancelled = threading.Event(), threading.Event()

    async def moderate(messages):
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with serving(create_app(engine, Settings(moderate=moderate))) as server:
        with leave(server, asking()):
            assert begun.wait(20)
        assert cancelled.wait(20)
        wait_for(lambda: server.app.state.gate.running == 0)
