"""Pictures inside the request: ``data:image/png;base64,...``."""

from __future__ import annotations

import base64
import re

from llava_fast.errors import ImageError

_HEAD = re.compile(r"data:(?P<type>[^;,]{0,80})(?:;[a-z0-9_-]{1,40}=[^;,]{0,80}){0,4};base64,", re.IGNORECASE)
_TYPE = re.compile(r"image/(?!svg)[a-z0-9.+-]+", re.IGNORECASE)
_STEP = 1 << 20  # characters decoded at a time: between two of them other threads run


def decode_data_uri(text: str, max_bytes: int) -> bytes:
    """The bytes of a data URI, which are not looked at.

    Base64 is taken strictly: padded, without line breaks, spaces or percent-encoding, and of the standard alphabet.

    Args:
        max_bytes: judged before anything is decoded.

    Raises:
        ImageError: no data URI of a picture of pixels in base64, or too many bytes. Nothing of it is repeated.
    """
    head = _HEAD.match(text)
    if head is None:
        raise ImageError("a data URI of a picture begins with 'data:image/png;base64,' or the like")
    if not _TYPE.fullmatch(head["type"]):
        raise ImageError("the data URI is not of a picture of pixels, such as image/png or image/jpeg")
    start, padding = head.end(), text.count("=", max(head.end(), len(text) - 2))
    size = (len(text) - start) // 4 * 3 - padding
    if size > max_bytes:
        raise ImageError(f"the picture in the data URI has {size} bytes, over the limit of {max_bytes}")
    out = bytearray()
    try:
        if text.find("=", start, len(text) - padding) >= 0:
            raise ValueError("padding before the end")
        for at in range(start, len(text), _STEP):
            out += base64.b64decode(text[at : at + _STEP], validate=True)
    except ValueError:
        cure = "send it padded, without line breaks and percent-encoding"
        raise ImageError(f"the data URI is not valid base64; {cure}") from None
    return bytes(out)
