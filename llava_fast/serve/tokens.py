"""The text and the bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import re
from functools import cache

from llava_fast.processor import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")  # a token that is one byte of a character
_SPACE = "\u2581"  # how SentencePiece writes a space


def bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What the token adds to a text, as UTF-8; joined over the tokens of a text, that text."""
    piece = tokenizer.piece(token_id)
    if tokenizer.byte_level and token_id not in tokenizer.special_tokens.values():
        alphabet = _alphabet()
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
    byte = _BYTE.match(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()


def text_of(tokenizer: Tokenizer, token_id: int) -> str:
    """The same as text; a part of a character as ``bytes:\\xe4``, as OpenAI's API writes it."""
    raw = bytes_of(tokenizer, token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others in their order for the characters from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
