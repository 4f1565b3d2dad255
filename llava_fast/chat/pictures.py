"""Pictures as a person names them: typed, dropped onto the terminal, pasted, or by web address."""

from __future__ import annotations

import http.client
import os
import shlex
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.error import URLError

from llava_fast.chat.conversation import Picture
from llava_fast.errors import ImageError
from llava_fast.processor.image import load_image

MAX_BYTES = 32 << 20  # of a picture from the web
SECONDS = 20.0  # from asking to the last byte
_CHUNK = 1 << 16


def names_in(text: str) -> list[str]:
    """The pictures that ``text`` names: addresses as they are, files as absolute paths.

    Understood are a path as it is, with or without spaces; several, quoted or escaped as a shell wants it, which is how
    terminals paste what is dropped onto them; and ``file://``. What names no file comes back as one path.
    """
    text = text.strip()
    if is_address(text):
        return [text]
    whole = _path(text)
    if whole.exists():
        return [str(whole)]
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe in a name
        words = []
    paths = [word if is_address(word) else str(_path(word)) for word in words]
    found = [is_address(name) or Path(name).exists() for name in paths]
    return paths if len(paths) == 1 or (paths and all(found)) else [str(whole)]


def dropped(line: str) -> list[str]:
    """The pictures of a line that is nothing but files that exist, as a terminal types them on a drop; else none."""
    if not line.lstrip().startswith(("/", "'/", '"/', "~/", "'~/", "file:///")):
        return []
    names = names_in(line)
    return names if all(Path(name).is_file() for name in names) else []


def is_address(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def open_picture(name: str) -> Picture:
    """Read a picture.

    Raises:
        ImageError: it cannot be had or is no picture.
    """
    if not is_address(name):
        return Picture(name, load_image(name))
    try:
        return Picture(name, load_image(fetch(name)))
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def _path(text: str) -> Path:
    if text.lower().startswith("file://"):
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    return Path(os.path.abspath(os.path.expanduser(text)))


def fetch(address: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> bytes:
    """What is at a web address that the user typed; http and https only, redirects included.

    Raises:
        ImageError: it is not to be had, larger than ``max_bytes``, or not there within ``seconds``, the look-up of the
            name included.
    """
    results: SimpleQueue[bytes | ImageError] = SimpleQueue()
    deadline = time.monotonic() + seconds

    def work() -> None:  # a look-up or a trickle of headers cannot be timed out from within
        try:
            results.put(_read(address, max_bytes, deadline))
        except ImageError as error:
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except Empty:
        raise ImageError(f"not there within {seconds:g} seconds; download it and give its path") from None
    if isinstance(result, ImageError):
        raise result
    return result


def _read(address: str, max_bytes: int, deadline: float) -> bytes:
    opener = urllib.request.OpenerDirector()  # build_opener's would read file:// and ftp:// too
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", "llava_fast")]
    found = bytearray()
    try:
        # Later than the deadline: by then whoever waits has been told.
        with opener.open(address, timeout=max(0.0, deadline - time.monotonic()) + 5) as response:
            while chunk := response.read1(_CHUNK):
                found += chunk
                if len(found) > max_bytes:
                    raise ImageError(f"more than {max_bytes >> 20} MiB; download it and give its path")
                if time.monotonic() > deadline:
                    raise ImageError("too slow")  # nobody waits for it any more
    except (URLError, OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"cannot be fetched: {getattr(error, 'reason', None) or error}") from error
    return bytes(found)
