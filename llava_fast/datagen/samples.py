"""Samples: turns as rows of the LLaVA JSON, with equation 2's random order of picture and first question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Self

from llava_fast.datagen.parse import Turn
from llava_fast.datagen.pictures import Picture
from llava_fast.processor.conversation import IMAGE_MARK


def make_sample(
    picture: Picture, kind: str, turns: Sequence[Turn], seed: int, questions: Sequence[str]
) -> dict[str, Any]:
    """A row. All that is drawn follows from (seed, picture, kind), whatever else a run does.

    Args:
        turns: an empty question is drawn from ``questions``.
    """
    rng = Random(f"{seed}/{picture.id}/{kind}")
    values: list[dict[str, str]] = []
    for question, answer in turns:
        values.append({"from": "human", "value": question or rng.choice(questions)})
        values.append({"from": "gpt", "value": answer})
    first = values[0]["value"]
    values[0]["value"] = f"{IMAGE_MARK}\n{first}" if rng.random() < 0.5 else f"{first}\n{IMAGE_MARK}"
    return {"id": f"{picture.id}-{kind}", "image": picture.image, "kind": kind, "conversations": values}


class RowsFile:
    """Rows of JSON on disk, written under a temporary name; the file takes its own when it is whole."""

    begin, between, end = "[\n", ",\n", "\n]\n"

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self._part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("w", encoding="utf-8")
        self._file.write(self.begin)

    def add(self, row: Any) -> None:
        self._file.write((self.between if self.count else "") + json.dumps(row, ensure_ascii=False))
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None and (self.count or self.begin):
            self._file.write(self.end)
        self._file.close()
        if error is None:
            self._part.replace(self.path)
        else:
            self._part.unlink(missing_ok=True)


class ArrayFile(RowsFile):
    """Rows as one JSON array."""


class LinesFile(RowsFile):
    """Rows as JSON lines."""

    begin, between, end = "", "\n", "\n"


def write_json(path: Path, content: Any) -> None:
    """Write ``content``, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
