"""Fetching what strangers name: nothing inside is dialled, whatever the URL, the DNS or a redirect says."""

# ruff: noqa: RUF001  (look-alike characters are what is tested)
from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
import ssl
import sys
from ipaddress import ip_address
from typing import Any

import pytest
import trustme
from hypothesis import example, given
from hypothesis import strategies as st

from llava_fast.errors import ConfigError, ImageError
from llava_fast.serve.addresses import is_inside, is_public
from llava_fast.serve.remote import RemotePolicy, fetch
from llava_fast.serve.urls import parse_url
from tests.serve.web import Names, Network, Web, moved, page, serving

PUBLIC, PUBLIC_2, PUBLIC_6 = "93.184.215.14", "151.101.1.6", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
ANYBODY = RemotePolicy(allow="public", max_bytes=100_000, timeout=20)
PICTURE = bytes(range(256)) * 40


def fetched(
    pages: dict[str, Any], url: str, policy: RemotePolicy = ANYBODY, names: Names | None = None, **more: Any
) -> tuple[bytes | str, Web, Network, Names]:
    """What ``url`` gives where every address leads to a server of ``pages``: the bytes, or the error's message."""

    async def run() -> tuple[bytes | str, Web, Network, Names]:
        resolve = names or Names(a_test=[PUBLIC], b_test=[PUBLIC_2], c_test=[PUBLIC_6])
        async with serving(pages, tls=more.pop("tls", None)) as web:
            network = more.pop("network", None) or Network(web.port)
            network.port = web.port
            try:
                result: bytes | str = await fetch(url, policy, resolve=resolve, network=network, **more)
            except ImageError as error:
                result = str(error)
            return result, web, network, resolve

    return asyncio.run(run())


def refused(url: str, policy: RemotePolicy = ANYBODY, **answers: Any) -> str:
    """The message of a refusal before anything is dialled."""
    message, web, network, _ = fetched({}, url, policy, Names(**answers) if answers else None)
    assert isinstance(message, str)
    assert not network.dialled
    assert not web.requests
    return message


# ---- what is fetched


def test_a_public_picture_at_the_address_that_was_checked():
    data, web, network, names = fetched({"/cat.png?x=1": page(PICTURE)}, "http://A.test./cat.png?x=1#part")
    assert data == PICTURE
    assert names.asked == ["a.test"]
    assert network.dialled == [(PUBLIC, 80)]
    lines = web.requests[0].split("\r\n")
    assert lines[0] == "GET /cat.png?x=1 HTTP/1.1"
    assert "Host: a.test" in lines
    assert "Accept-Encoding: identity" in lines
    names_sent = {line.partition(":")[0].lower() for line in lines[1:] if line}
    assert names_sent == {"host", "user-agent", "accept", "accept-encoding", "connection"}  # no cookie, no key


def test_the_next_address_where_the_first_is_dead():
    names = Names(a_test=[PUBLIC, PUBLIC_6, PUBLIC])
    data, _, network, _ = fetched({"/": page(PICTURE)}, "http://a.test", names=names, network=Network(0, (PUBLIC,)))
    assert data == PICTURE
    assert network.dialled == [(PUBLIC, 80), (PUBLIC_6, 80)]
    message, *_ = fetched({}, "http://a.test", network=Network(0, (PUBLIC,)))
    assert message == "the picture cannot be fetched: its server does not answer, or broke off"


def test_a_literal_public_address_needs_no_name():
    data, web, network, names = fetched({"/": page(PICTURE)}, f"http://[{PUBLIC_6}]:443/")
    assert data == PICTURE
    assert network.dialled == [(PUBLIC_6, 443)]
    assert not names.asked
    assert f"Host: [{PUBLIC_6}]:443\r\n" in web.requests[0]


def test_international_urls_are_spelled_as_browsers_do():
    names = Names(**{"xn--bcher-kva_test": [PUBLIC]})
    data, web, *_ = fetched({"/%C3%BC%20?q=%C3%A4": page(PICTURE)}, "http://BÜCHER.test/ü%20?q=ä", names=names)
    assert data == PICTURE
    assert "Host: xn--bcher-kva.test\r\n" in web.requests[0]


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    data, _, network, _ = fetched({"/": page(PICTURE)}, "http://a.test/")
    assert data == PICTURE
    assert network.dialled == [(PUBLIC, 80)]


@pytest.mark.parametrize("kind", ["image/jpeg", "Image/WebP; q=1", "application/octet-stream", None])
def test_types_that_pictures_come_under(kind: str | None):
    data, *_ = fetched({"/": page(PICTURE, kind=kind)}, "http://a.test/")
    assert data == PICTURE


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n"])
def test_a_chunked_picture(end: bytes):
    body = b"".join(b"%x\r\n%s\r\n" % (100, PICTURE[i : i + 100]) for i in range(0, 10_200, 100)) + end
    answer = page(b"", "Transfer-Encoding: chunked", length=False) + body
    data, *_ = fetched({"/": answer}, "http://a.test/")
    assert data == PICTURE[:10_200]


# ---- what is not


def test_nothing_is_fetched_by_default():
    assert not RemotePolicy().enabled
    assert "data: URI" in refused("http://a.test/", RemotePolicy())


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://127.0.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0X7F.1/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://127.0.0.01/",
        "http://127.0.0.1./",
        "http://127.0.0.1../",
        "http://127.0.0.0x/",
        "http://1.2.3.4.5/",
        "http://256.1.1.1/",
        "http://a.test.127.1/",
        "http://a.test.0x1/",
        "http://127%2e0.0.1/",
        "http://%31%32%37.0.0.1/",
        "http://１２７.０.０.１/",
        "http://127。0。0。1/",
        "http://①②⑦.⓪.⓪.①/",
        "http://127.0.0.1\u3002/",
        "http://0/",
        "http://0.0.0.0/",
        "http://10.1.2.3/",
        "http://172.31.255.255/",
        "http://192.168.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.100.100.200/",
        "http://168.63.129.16/",
        "http://198.18.0.1/",
        "http://192.0.0.192/",
        "http://192.88.99.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://[::]/",
        "http://[::1]/",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        f"http://[::ffff:{PUBLIC}]/",
        f"http://[::{PUBLIC}]/",
        "http://[::127.0.0.1]/",
        "http://[2002:7f00:1::]/",
        "http://[2002:5db8:d70e::1]/",
        "http://[2001:0:53aa:64c:0:5efe:7f00:1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b::169.254.169.254]/",
        "http://[64:ff9b:1::5db8:d70e]/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::1%25lo]/",
        "http://[fec0::1]/",
        "http://[fc00::1]/",
        "http://[fd00:ec2::254]/",
        "http://[ff02::1]/",
        "http://[2001:db8::1]/",
        "http://[3fff::1]/",
        "http://[100::1]/",
        "http://[5f00::1]/",
        "http://[v1.a]/",
        "http://[a.test]/",
        "http://[::1/",
        "http://::1/",
    ],
)
def test_addresses_that_are_not_public(url: str):
    names = Names()
    message, _, network, _ = fetched({}, url, names=names)
    assert isinstance(message, str)
    assert not network.dialled
    assert not any(name[-1].isdigit() for name in names.asked)  # libc would read them its own way


TRICKS = [
    "http://a.test\\@127.0.0.1/",
    "http://127.0.0.1\\@a.test/",
    "http://a.test\\.b.test/",
    "http:\\\\a.test/",
    "http:/\\a.test/",
    "http://a.test/\\b.test/cat.png",
    "http://a.test/cat.png?from=\\\\b.test",
    "http://user@a.test/",
    "http://user:pa%73s@a.test/",
    "http://a.test@127.0.0.1/",
    "http://127.0.0.1:80@a.test/",
    "http://@a.test/",
    "http://a.test#@127.0.0.1/".replace("#", "%23"),
    "http://a.test:80:80/",
    "http://a.test:http/",
    "http://a.test:-1/",
    "http://a.test:65536/",
    "http://a.test:0/",
    "http://a.test:8 0/",
    "http://a.test:８０/",
    "http://a.test\t/",
    "http://a.te\nst/",
    "http://a.test/\r\nHost: b.test",
    "http://a.test/a b",
    "http://a.test/\x00",
    "http://a.test/\x7f",
    "http://a.test/\x85",
    "http://a.test\u00a0/",
    " http://a.test/",
    "http://a.test/ ",
    "\thttp://a.test/",
    "http:///a.test/",
    "http:a.test",
    "http:/a.test/",
    "http://",
    "http://.",
    "http://./",
    "http://.a.test/",
    "http://a..test/",
    "http://a.test../",
    "http://-a.test/",
    "http://a.te$t/",
    "http://a.test,b.test/",
    "http://a.test;b.test/",
    "http://a,b/",
    "http://a.test%00.b.test/",
    "http://a.test%2fb/",
    "http://ａ.test／b.test/",
    "http://a.test℀.b.test/",
    "http://\ud800.test/",
    "http://a.test/\ud800",
    "http://" + "a" * 64 + ".test/",
    "http://" + "a." * 130 + "test/",
    "http://" + "ü" * 5000 + ".test/",
    "http://a.test/" + "x" * 9000,
    "//a.test/",
    "/etc/passwd",
    "a.test/cat.png",
    "",
    "file:///etc/passwd",
    "file://a.test/etc/passwd",
    "ftp://a.test/cat.png",
    "gopher://a.test:70/_",
    "ws://a.test/",
    "jar:http://a.test/!/",
    "dict://a.test:11211/",
    "javascript:alert(1)",
    "data:image/png;base64,AAAA",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "view-source:http://a.test/",
    "http://a.test:22/",
    "http://a.test:6379/",
    "http://a.test:8080/",
    "https://a.test:8443/",
]


@pytest.mark.parametrize("url", TRICKS)
def test_urls_that_parsers_read_differently_or_that_are_none(url: str):
    refused(url, a_test=[PUBLIC], b_test=[PUBLIC], a=[PUBLIC])


def test_refusals_say_why():
    assert "user name" in refused("http://bob@a.test/")
    assert "backslash" in refused("http://a.test\\b")
    assert "https://, http:// or data:" in refused("ftp://a.test/")
    assert "from ports 80 and 443" in refused("http://a.test:81/")
    assert "only from hosts that this server allows" in refused("http://a.test/", RemotePolicy(hosts=("b.test",)))


SECRETS = [
    "http://bob:hunter2@a.test/?token=abcdef",
    "http://inside.test/?token=abcdef",
    "http://a.test:70/?token=abcdef",
]


@pytest.mark.parametrize("url", SECRETS)
def test_messages_hold_no_secret(url: str):
    message = refused(url, inside_test=["10.9.8.7"])
    for secret in ("bob", "hunter2", "token", "abcdef", "10.9.8.7"):
        assert secret not in message


@pytest.mark.parametrize(
    "inside", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "x"]
)
def test_names_that_lead_inside(inside: str):
    alone = refused("http://in.test/", in_test=[inside])
    assert alone == refused("http://in.test/", in_test=[PUBLIC, inside])  # both kinds: an attempt at something
    assert alone == refused("http://in.test/", in_test=[inside, PUBLIC])
    assert alone == refused("http://in.test/", other_test=[])  # and nobody learns which names exist inside
    assert alone == refused("http://in.test/", in_test=[])


def test_dns_that_changes_is_asked_once():
    names = Names(a_test=[[PUBLIC], ["127.0.0.1"]])
    data, _, network, _ = fetched({"/": page(PICTURE)}, "http://a.test/", names=names)
    assert data == PICTURE
    assert network.dialled == [(PUBLIC, 80)]
    assert names.asked == ["a.test"]


def test_dns_that_changes_between_redirects():
    names = Names(a_test=[[PUBLIC], ["127.0.0.1"]])
    message, web, network, _ = fetched({"/": moved("/next"), "/next": page(PICTURE)}, "http://a.test/", names=names)
    assert isinstance(message, str)
    assert network.dialled == [(PUBLIC, 80)]
    assert len(web.requests) == 1


# ---- redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed_and_judged(status: str):
    pages = {"/": moved("http://b.test/there?x", status), "/there?x": page(PICTURE)}
    data, web, network, names = fetched(pages, "http://a.test/")
    assert data == PICTURE
    assert names.asked == ["a.test", "b.test"]
    assert network.dialled == [(PUBLIC, 80), (PUBLIC_2, 80)]
    assert "Host: b.test\r\n" in web.requests[1]


def test_a_redirect_takes_no_cookie_along():
    pages = {"/": page(b"", "Location: c/d", "Set-Cookie: a=b", status="302 Found"), "/c/d": page(PICTURE)}
    data, web, *_ = fetched(pages, "http://a.test/")
    assert data == PICTURE
    assert "cookie" not in web.requests[1].lower()


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "//127.0.0.1/",
        "http://inside.test/",
        "http://2130706433/",
        "http://[::1]/",
        "http://a.test:22/",
        "http://bob:hunter2@a.test/",
        "file:///etc/passwd",
        "ftp://a.test/",
        "data:image/png;base64,AAAA",
        "\\\\127.0.0.1\\x",
        "/\\127.0.0.1/",
        "http://[",
        "\t//127.0.0.1/",
        "/a b",
        "http://a.te\tst/",
        "",
        "/" + "x" * 9000,
    ],
)
def test_redirects_to_inside(location: str):
    names = Names(a_test=[PUBLIC], inside_test=["192.168.7.6"])
    message, web, network, _ = fetched({"/": moved(location)}, "http://a.test/", names=names)
    assert isinstance(message, str)
    assert network.dialled == [(PUBLIC, 80)]
    assert len(web.requests) == 1
    for secret in ("127.0.0.1", "192.168", "inside", "hunter2", "passwd"):
        assert secret not in message


def test_redirects_end():
    pages = {f"/{i}": moved(f"/{i + 1}") for i in range(9)} | {"/9": page(PICTURE)}
    policy = RemotePolicy(allow="public", max_redirects=3)
    data, web, *_ = fetched(pages, "http://a.test/6", policy)
    assert data == PICTURE
    message, web, *_ = fetched(pages, "http://a.test/5", policy)
    assert message == "the picture's address redirects more than 3 times"
    assert len(web.requests) == 4
    message, web, *_ = fetched(pages, "http://a.test/8", RemotePolicy(allow="public", max_redirects=0))
    assert len(web.requests) == 1


# ---- answers


@pytest.mark.parametrize(
    "answer",
    [
        page(PICTURE, status="404 Not Found"),
        page(PICTURE, status="206 Partial Content"),
        page(PICTURE, status="304 Not Modified"),
        page(gzip.compress(PICTURE), "Content-Encoding: gzip"),
        page(PICTURE, "Content-Encoding: identity, gzip"),
        page(PICTURE, "Content-Encoding: br", "Content-Encoding: identity"),
        page(PICTURE, "Transfer-Encoding: gzip, chunked", length=False),
        page(PICTURE, kind="text/html"),
        page(PICTURE, kind="application/json"),
        page(b"<svg/>", kind="image/svg+xml"),
        page(PICTURE, kind="image/png, text/html"),
        page(PICTURE, "Content-Type: text/html"),
        page(b"", "Content-Length: 100001", length=False),
        page(b"", "Content-Length: 99999999999999999999999999", length=False),
        page(b"", "Content-Length: -1", length=False),
        page(b"", "Content-Length: 1", "Content-Length: 2", length=False),
        page(bytes(100_001), "Content-Length: 100001", length=False),
        page(bytes(100_001), length=False),  # until the connection ends, which it need not
        page(b"", "Transfer-Encoding: chunked", length=False) + b"186a1\r\n" + bytes(100_001) + b"\r\n0\r\n\r\n",
        page(b"", "Transfer-Encoding: chunked", length=False) + b"ffffffffffffffffffffffff\r\n" + bytes(200_000),
        page(b"", "Transfer-Encoding: chunked", length=False) + b"xyz\r\n",
        page(b"", "Transfer-Encoding: chunked", length=False) + b"1;" + b"x" * 200_000,
        page(PICTURE, "X: " + "y" * 200_000),
        b"\x16\x03\x01\x02\x00" + bytes(200),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"y" * 200_000,
    ],
)
def test_answers_that_are_refused(answer: bytes):
    message, web, *_ = fetched({"/": answer}, "http://a.test/")
    assert isinstance(message, str)
    assert len(web.requests) == 1
    assert PUBLIC not in message


def test_a_length_over_the_limit_is_refused_before_the_body():
    message, *_ = fetched({"/": page(b"", "Content-Length: 100001", length=False)}, "http://a.test/")
    assert message == "the picture has 100001 bytes, over the limit of 100000"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", page(PICTURE)[:-1], page(PICTURE)[:60]])
def test_answers_that_break_off(answer: bytes):
    async def broken(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.write_eof()

    message, *_ = fetched({"/": broken}, "http://a.test/")
    assert message == "the picture cannot be fetched: its server does not answer, or broke off"


@pytest.mark.parametrize("length", [99_999, 100_000, 100_001])
@pytest.mark.parametrize("told", [True, False])
def test_the_limit_of_bytes_is_exact(length: int, told: bool):
    async def whole(writer: asyncio.StreamWriter) -> None:
        writer.write(page(bytes(length), "Connection: close", length=told))
        writer.write_eof()

    data, *_ = fetched({"/": whole}, "http://a.test/")
    assert (data == bytes(length)) is (length <= 100_000)


async def drip(writer: asyncio.StreamWriter, start: bytes) -> None:
    writer.write(start)
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nX: ",
        page(b"", "Content-Length: 90000", length=False),
    ],
)
def test_slow_servers_run_out_of_time(start: bytes):
    policy = RemotePolicy(allow="public", timeout=0.2)
    message, *_ = fetched({"/": lambda writer: drip(writer, start)}, "http://a.test/", policy)
    assert message == "the picture did not arrive within 0.2 seconds"


def test_time_runs_through_redirects_names_and_connections():
    async def late(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.08)
        writer.write(moved("/"))

    policy = RemotePolicy(allow="public", timeout=0.2, max_redirects=1000)
    message, web, *_ = fetched({"/": late}, "http://a.test/", policy)
    assert message == "the picture did not arrive within 0.2 seconds"
    assert len(web.requests) < 5

    class Never(Network):
        async def connect_tcp(self, *_args: Any, **_more: Any) -> Any:
            await asyncio.sleep(100)

    async def silent(host: str, port: int) -> list[str]:
        await asyncio.sleep(100)
        return [PUBLIC]

    assert fetched({}, "http://a.test/", policy, network=Never(0))[0] == message
    assert fetched({}, "http://a.test/", policy, names=silent)[0] == message  # type: ignore[arg-type]


def test_a_body_of_tiny_chunks_leaves_the_event_loop_to_others():
    body = page(b"", "Transfer-Encoding: chunked", length=False) + b"1\r\nx\r\n" * 8000 + b"0\r\n\r\n"

    async def run() -> int:
        turns, done = 0, False

        async def other() -> None:
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        async with serving({"/": body}) as web:
            await asyncio.sleep(0)
            task = asyncio.create_task(other())
            resolve, network = Names(a_test=[PUBLIC]), Network(web.port)
            assert await fetch("http://a.test/", ANYBODY, resolve=resolve, network=network) == b"x" * 8000
            done = True
            await task
        return turns

    assert asyncio.run(run()) > 8000 / 64


def test_a_cancelled_fetch_lets_go_of_its_connection():
    async def run() -> None:
        async with serving({"/": lambda writer: drip(writer, page(b"", length=False))}) as web:
            task = asyncio.create_task(
                fetch("http://a.test/", ANYBODY, resolve=Names(a_test=[PUBLIC]), network=Network(web.port))
            )
            while not web.requests:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await web.closed()

    asyncio.run(run())


# ---- listed hosts


def may(policy: RemotePolicy, url: str, *addresses: str) -> bool:
    """Whether ``url`` is dialled where its host has ``addresses``."""

    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses or [PUBLIC])

    result, _, network, _ = fetched({"/": page(PICTURE)}, url, policy, names=resolve)  # type: ignore[arg-type]
    assert (result == PICTURE) == bool(network.dialled)
    return bool(network.dialled)


def test_listed_hosts_alone():
    policy = RemotePolicy(hosts=("Images.Example.com", "*.cdn.example.com", "alt.example.com:8080", "bücher.example"))
    assert may(policy, "http://images.example.com/")
    assert may(policy, "http://images.example.com:443/")
    assert may(policy, "http://a.cdn.example.com/")
    assert may(policy, "http://a.b.cdn.example.com/")
    assert may(policy, "http://alt.example.com:8080/")
    assert may(policy, "http://xn--bcher-kva.example/")
    assert not may(policy, "http://images.example.com:8080/")
    assert not may(policy, "http://alt.example.com/")
    assert not may(policy, "http://cdn.example.com/")
    assert not may(policy, "http://xcdn.example.com/")
    assert not may(policy, "http://images.example.com.evil.test/")
    assert not may(policy, "http://evil-images.example.com/")
    assert not may(policy, f"http://{PUBLIC}/")
    assert not may(policy, "http://images.example.com/", "10.0.0.1")  # listed, and yet not inside


def test_hosts_inside_must_be_listed_as_such():
    policy = RemotePolicy(private_hosts=("store.internal:9000", "10.1.1.1", "[::1]:81"))
    assert may(policy, "http://store.internal:9000/", "192.168.3.4", "fd12::1")
    assert may(policy, "http://store.internal:9000/", "127.0.0.1")
    assert may(policy, "http://store.internal:9000/")
    assert may(policy, "http://10.1.1.1/")
    assert may(policy, "http://[0::1]:81/")
    assert not may(policy, "http://10.1.1.2/")
    assert not may(policy, "http://store.internal/", "192.168.3.4")
    assert not may(policy, "http://other.internal:9000/", "192.168.3.4")
    for never in ("169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "fe80::1", "::", "::ffff:10.0.0.1"):
        assert not may(policy, "http://store.internal:9000/", never)
        assert not may(policy, "http://store.internal:9000/", "192.168.3.4", never)


def test_a_public_server_lists_a_host_inside_and_a_redirect_there_needs_that_host():
    policy = RemotePolicy(allow="public", private_hosts=("store.test:9000",))
    names = Names(a_test=[PUBLIC], store_test=["10.0.0.5"])
    data, _, network, _ = fetched(
        {"/": moved("http://store.test:9000/x"), "/x": page(PICTURE)}, "http://a.test/", policy, names
    )
    assert data == PICTURE
    assert network.dialled == [(PUBLIC, 80), ("10.0.0.5", 9000)]
    _, _, network, _ = fetched({"/": moved("http://10.0.0.5:9000/x")}, "http://a.test/", policy, names)
    assert network.dialled == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "settings",
    [
        {"allow": "all"},
        {"hosts": "a.test"},
        {"hosts": ("http://a.test",)},
        {"hosts": ("*",)},
        {"hosts": ("a.*",)},
        {"hosts": ("",)},
        {"hosts": ("user@a.test",)},
        {"hosts": ("a.test:99999",)},
        {"hosts": ("a.test/x",)},
        {"private_hosts": ("127.1",)},
        {"private_hosts": ("10.0.0.0/8",)},
        {"max_bytes": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"max_redirects": -1},
    ],
)
def test_policies_that_cannot_work(settings: dict[str, Any]):
    with pytest.raises(ConfigError):
        RemotePolicy(**settings)


# ---- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls(authority: trustme.CA, *names: str) -> tuple[ssl.SSLContext, list[str | None]]:
    """A server's context, and the names that clients ask it for."""
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    return context, asked


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_tls_keeps_the_name_while_the_address_is_dialled(authority: trustme.CA):
    server, asked = tls(authority, "a.test")
    data, web, network, _ = fetched(
        {"/": page(PICTURE)}, "https://a.test/", tls=server, ssl_context=trusting(authority)
    )
    assert data == PICTURE
    assert network.dialled == [(PUBLIC, 443)]
    assert asked == ["a.test"]
    assert "Host: a.test\r\n" in web.requests[0]


@pytest.mark.parametrize("names", [("b.test",), (PUBLIC,), ("127.0.0.1",), ("*.a.test",)])
def test_a_certificate_for_another_name(authority: trustme.CA, names: tuple[str, ...]):
    server, _ = tls(authority, *names)
    message, web, *_ = fetched({"/": page(PICTURE)}, "https://a.test/", tls=server, ssl_context=trusting(authority))
    assert message == (
        "the picture cannot be fetched: its server's certificate is not valid for that name, or not trusted"
    )
    assert not web.requests


def test_a_certificate_of_nobody_known(authority: trustme.CA):
    server, _ = tls(authority, "a.test")
    message, web, *_ = fetched({"/": page(PICTURE)}, "https://a.test/", tls=server)  # the system's certificates
    assert "not trusted" in message
    assert not web.requests


# ---- which addresses are public


@given(st.ip_addresses())
@example(ip_address("64:ff9b::1.1.1.1"))
@example(ip_address("64:ff9b::10.0.0.1"))
def test_what_is_called_public_is_global_for_python_too(address: ipaddress.IPv4Address | ipaddress.IPv6Address):
    if is_public(address):
        assert address.is_global
        assert not (address.is_multicast or address.is_unspecified)
        assert not is_inside(address)
    if is_inside(address):
        assert not address.is_global
        assert not (address.is_multicast or address.is_link_local or address.is_unspecified)


@pytest.mark.parametrize(
    "public", ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "192.0.1.1", "223.255.255.255"]
)
def test_public_ipv4(public: str):
    assert is_public(ip_address(public))
    assert is_public(ip_address(f"64:ff9b::{public}"))
    for disguise in (f"::ffff:{public}", f"::{public}"):
        assert not is_public(ip_address(disguise))


@pytest.mark.parametrize("public", [PUBLIC_6, "2001:4860:4860::8888", "2a00::1", "2400:cb00::1"])
def test_public_ipv6(public: str):
    assert is_public(ip_address(public))
    assert not is_public(ip_address(public + "%1"))


@given(st.text() | st.from_regex(r"https?://[^/]{0,20}/.{0,9}"))
def test_any_text_is_a_url_in_one_form_or_an_error(text: str):
    try:
        url = parse_url(text)
    except ImageError:
        return
    assert parse_url(str(url)) == url
    assert str(url).isascii()
    assert " " not in str(url)
    if url.is_address:
        ip_address(url.host)


# ---- without its library


def test_without_httpcore2_there_is_a_clear_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "httpcore2", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava-fast\[serve\]'"):
        asyncio.run(fetch("http://a.test/", ANYBODY))


def test_the_systems_resolver_and_network():
    """Over real sockets: localhost, a host inside that is listed."""

    async def run(policy: RemotePolicy, host: str) -> bytes:
        async with serving({"/": page(PICTURE)}, host="127.0.0.1") as web:
            return await fetch(f"http://{host}:{web.port}/", policy)

    class AnyPort(RemotePolicy):
        def may_dial(self, host: str, port: int) -> Any:
            return super().may_dial(host, 80)

    assert asyncio.run(run(AnyPort(private_hosts=("localhost",)), "localhost")) == PICTURE
    for policy in (RemotePolicy(allow="public"), RemotePolicy(hosts=("localhost",))):
        with pytest.raises(ImageError):
            asyncio.run(run(policy, "localhost"))
    with pytest.raises(ImageError, match="no address"):
        asyncio.run(run(AnyPort(private_hosts=("no-such-name.invalid",)), "no-such-name.invalid"))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_over_real_sockets():
    async def run() -> bytes:
        try:
            async with serving({"/": page(PICTURE)}, host="::1") as web:
                return await fetch(f"http://[::1]:{web.port}/", RemotePolicy(private_hosts=(f"[::1]:{web.port}",)))
        except OSError:
            pytest.skip("no IPv6 loopback here")

    assert asyncio.run(run()) == PICTURE
