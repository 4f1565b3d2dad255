"""http(s) URLs from strangers, taken apart once. Whoever judges a URL and whoever fetches it work on the same parts.

What parsers are known to read differently (backslashes, user names, odd spellings of IPv4 addresses, characters that
some of them drop) is refused and not mended.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote, urljoin, urlsplit

from llava_fast.errors import ImageError

PORTS = {"http": 80, "https": 443}

_MAX_URL = 8192  # characters
_MAX_NAME = 253  # characters of a host name
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\]")  # what some parsers drop, trim, or read as a slash
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:@%]+))(?::(?P<port>[0-9]{0,5}))?")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label such as these makes browsers and libc read an IPv4 address
_IN_PATH = "/%:@!$&'()*+,;=~"


@dataclass(frozen=True)
class HttpUrl:
    """The parts of a URL, each in its one form.

    Attributes:
        scheme: "http" or "https".
        host: an ASCII name in lower case without the root's dot, or an address without brackets.
        path: with the query, percent-encoded; never empty.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def is_address(self) -> bool:
        """Whether the host is no name but an IPv4 or IPv6 address."""
        return ":" in self.host or _NUMBER.fullmatch(self.host.rpartition(".")[2]) is not None

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def parse_url(text: str) -> HttpUrl:
    """The parts of an absolute URL; its fragment is dropped.

    Raises:
        ImageError: it is not plainly an http(s) URL. The message repeats nothing of it.
    """
    if len(text) > _MAX_URL:
        raise ImageError(f"an image address of {len(text)} characters is over the limit of {_MAX_URL}")
    if _FORBIDDEN.search(text):
        raise ImageError("the image address holds a space, a control character or a backslash; percent-encode it")
    try:
        parts = urlsplit(text)
        host, port = split_authority(parts.netloc) if parts.netloc and "@" not in parts.netloc else ("", None)
        path = quote(parts.path or "/", safe=_IN_PATH)
        query = quote(parts.query, safe=_IN_PATH + "?[]|")
    except ValueError as error:  # UnicodeError among them
        raise ImageError("the image address is malformed; write it like https://images.example.com/cat.jpg") from error
    if parts.scheme not in PORTS:
        raise ImageError("an image address must begin with https://, http:// or data:")
    if "@" in parts.netloc:
        raise ImageError("an image address must not hold a user name or password")
    if not host:
        raise ImageError("the image address names no host; write it like https://images.example.com/cat.jpg")
    return HttpUrl(parts.scheme, host, port or PORTS[parts.scheme], f"{path}?{query}" if query else path)


def join_url(base: HttpUrl, location: str) -> str:
    """Where a redirect leads, not judged yet. Raises ImageError where that cannot be told."""
    if not location or len(location) > _MAX_URL or _FORBIDDEN.search(location):  # joining would drop some of them
        raise ImageError("the picture's address redirects to something that is no address")
    try:
        return urljoin(str(base), location)
    except ValueError as error:
        raise ImageError("the picture's address redirects to something that is no address") from error


def split_authority(text: str) -> tuple[str, int | None]:
    """The host in its one form, and the port where there is one. Raises ValueError."""
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise ValueError("not host or host:port")
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"port {port} is not between 1 and 65535")
    if match["v6"]:
        return str(IPv6Address(match["v6"])), port
    return _host_name(match["name"]), port


def _host_name(text: str) -> str:
    """A name in lower case and ASCII without the root's dot, or four decimal numbers. Raises ValueError."""
    if len(text) > _MAX_NAME:
        raise ValueError("the name is too long")
    if not text.isascii():
        import idna  # comes with the server's other parts

        text = idna.encode(text, uts46=True).decode()  # as browsers do; IDNAError is a ValueError
    name = text.lower().removesuffix(".")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        return str(IPv4Address(name))  # in no other spelling: not octal, hexadecimal, short, or one large number
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError("not a host name")
    return name
