"""Tokens to text as they come: nothing is shown that a later token could still change."""

from __future__ import annotations

from collections.abc import Sequence

from llava_fast.processor import Tokenizer

UNFINISHED = "\ufffd"  # what the bytes of half a character decode to, one each or one for all
MOST_UNFINISHED = 3  # of them at the end: four bytes are a character


class TextStream:
    """Text of a growing list of tokens, cut off at the first stop text.

    Held back are characters whose bytes are incomplete and text that may be the beginning of a stop text.

    Attributes:
        watches: whether there are stop texts, so that every token must be looked at as it comes. Otherwise several at
            a time cost as much as one.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], include_stop: bool):
        self._tokenizer, self._stops, self._include = tokenizer, tuple(stops), include_stop
        self.watches = bool(self._stops)
        self._ids: list[int] = []
        self._from = 0  # decoding starts here: far enough back for what joins tokens, such as spaces
        self._whole = 0  # the text up to this token ends with a whole character
        self._taken = 0  # characters of the text from `_from` on that are in `_held` or were given out
        self._held = ""

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def push(self, *tokens: int, may_stop: bool = True) -> tuple[str, bool]:
        """Tokens that are new. Returns the text that is certain now, and whether a stop text was found."""
        self._ids += tokens
        now = self._tokenizer.decode(self._ids[self._from :])
        certain = len(now)
        while certain and len(now) - certain < MOST_UNFINISHED and now[certain - 1] == UNFINISHED:
            certain -= 1
        grew = certain > self._taken
        self._held += now[self._taken : certain]
        self._taken = max(self._taken, certain)
        if grew and certain == len(now):
            self._from, self._whole = self._whole, len(self._ids)
            self._taken = len(self._tokenizer.decode(self._ids[self._from :]))
        return self._take(may_stop)

    def finish(self) -> str:
        """What was held back, once no more tokens come and no stop text was found; asked again, nothing."""
        now = self._tokenizer.decode(self._ids[self._from :])
        text, self._held, self._taken = self._held + now[self._taken :], "", len(now)
        return text

    def _take(self, may_stop: bool) -> tuple[str, bool]:
        if not self._stops:
            text, self._held = self._held, ""
            return text, False
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0] if may_stop else []
        if found:
            at, stop = min(found, key=lambda pair: pair[0])
            return self._held[: at + len(stop) * self._include], True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, and that is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
