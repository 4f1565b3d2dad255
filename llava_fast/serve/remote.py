"""Pictures at http(s) addresses that strangers name, fetched so that nothing inside can be reached.

    data = await fetch("https://images.example.org/cat.jpg", RemotePolicy(allow="public"))

Off by default. A URL is taken apart once and only its parts go on; the host is resolved once, every address that it has
must be allowed, and the connection goes to one of those; a redirect is a new URL and judged as the first. One clock
runs from the first to the last byte, and bytes are counted as they come.

What this cannot see: a public address that a router leads back inside, and a NAT64 prefix of the network's own.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

from llava_fast.errors import ConfigError, ImageError
from llava_fast.serve.addresses import Address, is_inside, is_public
from llava_fast.serve.urls import PORTS, HttpUrl, join_url, parse_url, split_authority

if TYPE_CHECKING:
    import httpcore2

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From host and port to every address of the host, numbers as text. Raises OSError where it has none."""

_DNS_THREADS = 8  # slow name servers can hold up other fetches, and nothing else
_BREATH = 64  # pieces of a body between two turns of the event loop
_PICTURE_TYPES = re.compile(r"image/(?!svg)[a-z0-9.+-]+|application/octet-stream|binary/octet-stream")
_HEADERS = {
    "User-Agent": "llava-fast",
    "Accept": "image/jpeg, image/png, image/webp, image/gif, image/*;q=0.5",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
_OFF = "pictures are not fetched from the network here; send the picture itself, as a data: URI"


@dataclass(frozen=True)
class RemotePolicy:
    """What may be fetched. The default: nothing.

    Attributes:
        allow: "public" for every host with public addresses; "none" for the listed hosts alone.
        hosts: hosts that may be fetched from, as long as all their addresses are public: ``images.example.com``, or
            ``*.example.com`` for every name below it; with a port (``images.example.com:8443``) that port and no other,
            else 80 and 443.
        private_hosts: the same for hosts inside: their addresses may also be loopback or private ones, never
            link-local. Whoever can set the DNS of such a name (of ``*.example.com``: any name below) chooses what is
            dialled.
        max_bytes: the largest picture, in bytes.
        timeout: seconds for all of it: resolving, connecting, every redirect, the last byte.
        max_redirects: how many are followed.

    Raises:
        ConfigError: a value that cannot work.
    """

    allow: Literal["none", "public"] = "none"
    hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    max_bytes: int = 20 << 20
    timeout: float = 10.0
    max_redirects: int = 3
    _public: tuple[_Entry, ...] = field(init=False, repr=False, compare=False)
    _private: tuple[_Entry, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.allow not in ("none", "public"):
            raise ConfigError(f"allow={self.allow!r} is not known; choose 'none' or 'public'")
        for name in ("hosts", "private_hosts"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a tuple of host names")
        for name, value, least in (
            ("max_bytes", self.max_bytes, 1),
            ("timeout", self.timeout, 0.001),
            ("max_redirects", self.max_redirects, 0),
        ):
            if not value >= least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        object.__setattr__(self, "_public", tuple(_Entry.parse(text) for text in self.hosts))
        object.__setattr__(self, "_private", tuple(_Entry.parse(text) for text in self.private_hosts))

    @property
    def enabled(self) -> bool:
        """Whether anything at all may be fetched."""
        return self.allow == "public" or bool(self.hosts or self.private_hosts)

    def may_dial(self, host: str, port: int) -> Callable[[Address], bool] | None:
        """Which addresses ``host`` may have for a connection to ``port``; None where it may not be fetched from."""
        if any(entry.matches(host, port) for entry in self._private):
            return lambda address: is_public(address) or is_inside(address)
        if any(entry.matches(host, port) for entry in self._public):
            return is_public
        return is_public if self.allow == "public" and port in PORTS.values() else None


@dataclass(frozen=True)
class _Entry:
    """A listed host: its name, or with ``below`` every name below it; ``port`` None for 80 and 443."""

    name: str
    below: bool
    port: int | None

    @staticmethod
    def parse(text: str) -> _Entry:
        below = text.startswith("*.")
        try:
            name, port = split_authority(text.removeprefix("*."))
        except ValueError as error:
            raise ConfigError(
                f"{text!r} is no host: {error}; write it as images.example.com, *.example.com or example.com:8443"
            ) from error
        return _Entry(name, below, port)

    def matches(self, host: str, port: int) -> bool:
        named = host.endswith("." + self.name) if self.below else host == self.name
        return named and (port in PORTS.values() if self.port is None else port == self.port)


async def fetch(
    url: str,
    policy: RemotePolicy,
    *,
    resolve: Resolve | None = None,
    network: httpcore2.AsyncNetworkBackend | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> bytes:
    """The bytes at ``url``: at most ``policy.max_bytes``, called a picture by their server, not decoded.

    Args:
        resolve: asked once for each URL; the system's resolver when not given.
        network: what opens connections to addresses, an httpcore2 network backend.
        ssl_context: for certificates that the system does not trust.

    Raises:
        ImageError: not allowed, not reachable, too large, too slow, or no picture. The message holds no resolved
            address, user name, password, path or query, and does not tell a name that does not exist from one inside.
        ConfigError: httpcore2 is not installed.
    """
    if not policy.enabled:
        raise ImageError(_OFF)
    try:
        import httpcore2
    except ImportError as error:
        raise ConfigError("fetching pictures needs httpcore2: pip install 'llava-fast[serve]'") from error
    try:
        async with asyncio.timeout(policy.timeout):
            return await _follow(url, policy, resolve or _resolve, network, ssl_context)
    except (TimeoutError, httpcore2.TimeoutException) as error:
        raise ImageError(f"the picture did not arrive within {policy.timeout:g} seconds") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
        raise ImageError(f"the picture cannot be fetched: {_why(error)}") from error


async def _follow(
    url: str,
    policy: RemotePolicy,
    resolve: Resolve,
    network: httpcore2.AsyncNetworkBackend | None,
    ssl_context: ssl.SSLContext | None,
) -> bytes:
    from llava_fast.serve import pinned

    for hop in range(policy.max_redirects + 1):
        target = parse_url(url)
        name = target.authority if hop == 0 else "the host that the picture's address redirects to"
        addresses = await _addresses(target, name, policy, resolve)
        async with pinned.get(
            target,
            addresses,
            _HEADERS,
            timeout=policy.timeout,
            network=network,
            ssl_context=ssl_context,
        ) as response:
            headers = _headers(response.headers)
            if response.status not in (301, 302, 303, 307, 308):
                _check_response(response.status, headers, policy)
                return await _read(response.aiter_stream(), policy.max_bytes)
        url = join_url(target, headers.get("location", ""))
    raise ImageError(f"the picture's address redirects more than {policy.max_redirects} times")


async def _addresses(target: HttpUrl, name: str, policy: RemotePolicy, resolve: Resolve) -> list[str]:
    """What may be dialled: every address of the host. Raises ImageError where one of them is not allowed."""
    may_dial = policy.may_dial(target.host, target.port)
    if may_dial is None:
        ports = " and from ports 80 and 443" if policy.allow == "public" else ""
        raise ImageError(f"pictures are not fetched from {name}, only from hosts that this server allows{ports}")
    try:
        found = [target.host] if target.is_address else await resolve(target.host, target.port)
        addresses = list(dict.fromkeys(ip_address(text) for text in found))
    except (OSError, ValueError):
        addresses = []
    if not addresses or not all(may_dial(address) for address in addresses):
        raise ImageError(f"{name} has no address that pictures may be fetched from")
    return [str(address) for address in addresses]


async def _resolve(host: str, port: int) -> list[str]:
    look_up = asyncio.get_running_loop().run_in_executor(
        _dns_threads(), lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    return [str(found[4][0]) for found in await look_up]


@cache
def _dns_threads() -> ThreadPoolExecutor:
    """Threads of their own: the loop's are few, and a name server that never answers would hold all of them."""
    return ThreadPoolExecutor(_DNS_THREADS, thread_name_prefix="llava_fast.dns")


def _headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """By lower-case name; of a name that comes twice both values, joined by a comma."""
    merged: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("ascii").lower(), raw_value.decode("utf-8", "replace")
        merged[name] = f"{merged[name]}, {value}" if name in merged else value
    return merged


def _check_response(status: int, headers: dict[str, str], policy: RemotePolicy) -> None:
    if status != 200:
        raise ImageError(f"the picture's server answered with status {status}")
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ImageError("the picture's server sent it compressed, which was not asked for")
    kind = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if not _PICTURE_TYPES.fullmatch(kind):
        raise ImageError(f"the address leads to {kind[:60]!r} and not to a picture of pixels")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > policy.max_bytes:
        raise ImageError(f"the picture has {length[:20]} bytes, over the limit of {policy.max_bytes}")


async def _read(body: AsyncIterable[bytes], max_bytes: int) -> bytes:
    data, pieces = bytearray(), 0
    async for piece in body:
        data += piece
        if len(data) > max_bytes:
            raise ImageError(f"the picture is over the limit of {max_bytes} bytes")
        pieces += 1
        if pieces % _BREATH == 0:  # a body of one-byte chunks comes by the thousand without waiting for the network
            await asyncio.sleep(0)
    return bytes(data)


def _why(error: Exception) -> str:
    """A cause in words of our own: those of sockets and TLS name addresses."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return "its server's certificate is not valid for that name, or not trusted"
        if isinstance(error, ssl.SSLError):
            return "its server speaks no TLS that is understood here"
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "its server does not answer, or broke off"
