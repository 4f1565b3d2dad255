"""Samples: LLaVA conversation files as one lazy sequence. Only where each row lies is held, the rows stay on disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.errors import ConfigError, SampleError

PathLike = str | os.PathLike[str]

_ROLES = ("human", "gpt")
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = "\xef\xbb\xbf"  # UTF-8 byte order mark, read as latin-1


def load_samples(path: PathLike | Sequence[PathLike], image_dir: PathLike | None = None) -> Samples:
    """Opens LLaVA JSON (an array) or JSONL files, told apart by their first character.

    Args:
        path: a file, or several to be read one after the other.
        image_dir: what image paths are relative to; the folder of the data file when not given.

    Raises:
        ConfigError: a file is missing or cannot be read.
        SampleError: a file is not JSON; the message names the line.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    return Samples([_File(Path(p), Path(image_dir) if image_dir is not None else Path(p).parent) for p in paths])


class Samples:
    """A sequence of samples ``{"id": str, "image": str | list[str], "conversations": [{"from", "value"}, ...]}``.

    ``image`` holds absolute paths and is absent in a text-only sample. A row is read, parsed and checked when it is
    asked for; whether its image exists shows when the image is opened. Safe to share between threads and cheap to
    send to worker processes: 16 bytes a row.
    """

    def __init__(self, files: list[_File]):
        self._files = files
        self._starts = np.cumsum([0, *(len(file) for file in files)])  # index of each file's first sample, and the end

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample ``index``; its place in the sequence is its id where the file gives none.

        Raises:
            IndexError: out of range.
            SampleError: the row is not a sample; the message says where it stands and what is wrong.
        """
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} does not exist among {len(self)}")
        which = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._files[which].sample(place - int(self._starts[which]), str(place))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


class _File:
    """One data file and the byte span of each of its rows."""

    def __init__(self, path: Path, image_dir: Path):
        self.path = path.absolute()
        self.image_dir = image_dir.absolute()
        try:
            self.spans = _find_rows(self.path)  # (N, 2) int64, start and end
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the data file: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self.spans)

    def sample(self, row: int, default_id: str) -> dict[str, Any]:
        start, end = self.spans[row].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            raw = file.read(end - start)
        try:
            value = json.loads(raw)  # bytes: decoded as UTF-8
        except ValueError as error:
            raise SampleError(self._where(start), f"not a JSON row: {error}") from error
        if not isinstance(value, dict):
            raise SampleError(self._where(start), f"expected an object with 'conversations', found {_short(value)}")
        sample_id = str(value.get("id", default_id))
        fault = _fault(value)
        if fault:
            raise SampleError(sample_id, f"{fault} ({self._where(start)})")
        sample = {"id": sample_id, "conversations": value["conversations"]}
        image = value.get("image")
        if image:
            sample["image"] = self._resolve(image) if isinstance(image, str) else [self._resolve(x) for x in image]
        return sample

    def _resolve(self, image: str) -> str:
        return str(self.image_dir / image)

    def _where(self, offset: int) -> str:
        """File and line of a byte offset; counted only when there is something to report."""
        with self.path.open("rb") as file:
            return f"{self.path.name} line {file.read(offset).count(10) + 1}"


def _fault(value: dict[str, Any]) -> str | None:
    """What keeps ``value`` from being a sample."""
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        return f"'conversations' must be a list of turns that is not empty, found {_short(turns)}"
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            return f"turn {number} must be {{'from': 'human' or 'gpt', 'value': text}}, found {_short(turn)}"
    image = value.get("image")
    names = image if isinstance(image, list) else [image]
    if image is not None and not all(isinstance(name, str) and name for name in names):
        return f"'image' must be a path or a list of paths, found {_short(image)}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _find_rows(path: Path) -> np.ndarray:
    """The byte spans (N, 2) of the rows of a JSON array or of JSON lines."""
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(_BOM.encode("latin-1")).lstrip()[:1]
    if not first:
        raise SampleError(path.name, "the data file is empty; expected a JSON array or JSON lines")
    return _find_array_rows(path) if first == b"[" else _find_lines(path)


def _find_lines(path: Path) -> np.ndarray:
    spans: list[tuple[int, int]] = []
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number == 0 and line.startswith(_BOM.encode("latin-1")):
                start, line = 3, line[3:]
            if line.strip():
                if not line.lstrip().startswith(b"{"):
                    raise SampleError(f"{path.name} line {number + 1}", f"expected a JSON object, found {line[:40]!r}")
                spans.append((start, start + len(line)))
            start += len(line)
    return np.array(spans, np.int64).reshape(-1, 2)


def _find_array_rows(path: Path) -> np.ndarray:
    # Read as latin-1 a character is a byte, so the parser's positions are file offsets. Names and text come out garbled
    # where they are not ASCII, but JSON's own marks are all ASCII and only positions are kept.
    with path.open(encoding="latin-1", newline="") as file:
        text = file.read()
    parse = json.JSONDecoder().raw_decode
    spans: list[tuple[int, int]] = []
    try:
        at = _skip_space(text, text.index("[") + 1)
        while text[at : at + 1] != "]" or spans:
            _, end = parse(text, at)
            spans.append((at, end))
            at = _skip_space(text, end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _skip_space(text, at + 1)
        rest = _skip_space(text, at + 1)
        if rest != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, rest)
    except json.JSONDecodeError as error:
        raise SampleError(f"{path.name} line {error.lineno}", f"the file is not valid JSON: {error.msg}") from error
    return np.array(spans, np.int64).reshape(-1, 2)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
