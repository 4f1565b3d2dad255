"""What a teacher wrote, taken apart: ``Question:`` and ``Answer:`` blocks between lines of ``===``, or plain text."""

from __future__ import annotations

import re

Turn = tuple[str, str]  # question, answer

_CUT = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
_HEAD = re.compile(r"^\s*[*#]*\s*(Question|Answer)\s*:\s*[*]*\s*", re.IGNORECASE)


class Unparsable(ValueError):
    """The text is not in the form that was asked for."""


def parse_turns(text: str) -> list[Turn]:
    """The questions and answers of a text in the form of the prompts.

    Raises:
        Unparsable: blocks are missing, out of order, or without their heading.
    """
    blocks = [block for block in _CUT.split(text) if block.strip()]
    said = []
    for number, block in enumerate(blocks):
        wanted = ("question", "answer")[number % 2]
        head = _HEAD.match(block)
        if head is None or head[1].lower() != wanted:
            raise Unparsable(f"block {number + 1} does not begin with '{wanted.capitalize()}:': {block.strip()[:40]!r}")
        said.append(block[head.end() :].strip())
    if len(said) % 2:
        raise Unparsable("the last question has no answer")
    return list(zip(said[::2], said[1::2], strict=True))


def parse_description(text: str) -> str:
    """A description as it stands.

    Raises:
        Unparsable: it is questions and answers instead.
    """
    if _HEAD.match(text) or _CUT.search(text):
        raise Unparsable("questions and answers where a description was asked for")
    return text.strip()
