"""Tokens to text as they come: nothing is shown that a later token could still change."""

from __future__ import annotations

from collections.abc import Sequence

from llava_fast.processor import Tokenizer

UNFINISHED = "\ufffd"  # what the bytes of half a character decode to
LONGEST_CHARACTER = 4  # bytes, each of which may be a token


class TextStream:
    """Text of a growing list of tokens, cut off at the first stop text.

    Held back are characters whose bytes are incomplete and text that may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], include_stop: bool):
        self._tokenizer, self._stops, self._include = tokenizer, tuple(stops), include_stop
        self._ids: list[int] = []
        self._decoded_from = 0  # decoding starts here: far enough back for what joins tokens, such as spaces
        self._decoded_to = 0  # tokens whose text is in `_held` or was given out
        self._held = ""

    def push(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """One token more. Returns the text that is certain now, and whether a stop text was found."""
        self._ids.append(token)
        decode = self._tokenizer.decode
        before = decode(self._ids[self._decoded_from : self._decoded_to])
        now = decode(self._ids[self._decoded_from :])
        if now.endswith(UNFINISHED) and len(self._ids) - self._decoded_to < LONGEST_CHARACTER:
            return "", False
        if len(now) > len(before):
            self._held += now[len(before) :]
            self._decoded_from, self._decoded_to = self._decoded_to, len(self._ids)
        return self._take(may_stop)

    def drop(self) -> None:
        """Nothing of what was held back belongs to the answer."""
        self._held, self._decoded_from, self._decoded_to = "", len(self._ids), len(self._ids)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        before = self._tokenizer.decode(self._ids[self._decoded_from : self._decoded_to])
        rest = self._held + self._tokenizer.decode(self._ids[self._decoded_from :])[len(before) :]
        self.drop()
        return rest

    def _take(self, may_stop: bool) -> tuple[str, bool]:
        if not self._stops or not may_stop:
            text, self._held = self._held, ""
            return text, False
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda pair: pair[0])
            text = self._held[: at + len(stop) * self._include]
            self._held = ""
            return text, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, and that is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
