"""Files that come in and go out: JSON and JSONL, read with errors that say which line, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError

Row = dict[str, Any]


def read_object(path: Path) -> Row:
    """A JSON object.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    content = _bytes(path)
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; give a file that is") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__} where an object must stand")
    return value


def read_rows(path: Path, needed: Iterable[str] = ()) -> list[Row]:
    """The objects of a JSONL file, or of a JSON list; blank lines are none.

    Args:
        path: the file.
        needed: names that every object must have.

    Raises:
        ConfigError: the file cannot be read, or a line is malformed; says which.
    """
    text = _bytes(path).removeprefix(b"\xef\xbb\xbf")
    if text.lstrip().startswith(b"["):
        try:
            numbered = list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ConfigError(f"{path} begins as a JSON list and is none: {error}") from error
    else:
        numbered = [
            (n, _parse(path, n, line)) for n, line in enumerate(text.splitlines(), 1) if line and not line.isspace()
        ]
    names = tuple(needed)
    for number, row in numbered:
        missing = [name for name in names if not isinstance(row, dict) or name not in row]
        if missing or not isinstance(row, dict):
            raise ConfigError(f"{path}, entry {number}: {str(row)[:80]!r} has no {missing[0]!r}; it must be an object")
    return [row for _, row in numbered]


def digest_of(path: Path) -> str:
    """Tells files of equal name apart: 128 bits of BLAKE2b over the content."""
    return blake2b(_bytes(path), digest_size=16).hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    part.replace(path)


def write_object(path: Path, value: Row) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check_writable(path: Path, option: str) -> None:
    """Before work is done that could then not be kept.

    Raises:
        ConfigError: there is no folder to write ``path`` into.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: give a file name in a folder that exists")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file that can be read") from error


def _parse(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {line[:60]!r}: {error}; mend or delete it") from error
