"""The texts that teachers are given: files of this package, or a user's own in their place."""

from __future__ import annotations

import re
from pathlib import Path

from llava_fast.errors import ConfigError
from llava_fast.teacher import Message

_FOLDER = Path(__file__).parent / "prompts"


def wording(name: str, own: Path | None = None, places: tuple[str, ...] = ()) -> str:
    """A text with places such as ``{question}``.

    Args:
        name: of the package's own text.
        own: a file to take instead.
        places: names that the text must have a place for.

    Raises:
        ConfigError: the file cannot be read or lacks a place.
    """
    path = own or _FOLDER / f"{name}.txt"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a text file") from error
    missing = [place for place in places if f"{{{place}}}" not in text]
    if missing:
        raise ConfigError(f"{path} has no place {{{missing[0]}}}; it needs {', '.join(f'{{{p}}}' for p in places)}")
    return text


def fill(text: str, **values: str) -> str:
    """``text`` with its places filled, all at once: what is put in is never searched for places."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)


def conversation(system: str, *turns: str) -> list[Message]:
    """Messages: the system text, then user and assistant in turn."""
    said = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *said]
