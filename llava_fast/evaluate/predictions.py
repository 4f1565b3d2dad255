"""Answers to ScienceQA: read in either of the forms that exist, and turned into choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.evaluate.choices import LETTERS, find_choice, guess
from llava_fast.evaluate.files import read_object, read_rows

Problems = Mapping[str, Mapping[str, Any]]


@dataclass
class Predictions:
    """Attributes:
    texts: what was said, by id of the problem.
    stored: the choice that the file itself names, from 0, by id; empty where it names none.
    """

    texts: dict[str, str] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)


def read_predictions(path: Path) -> Predictions:
    """The authors' result form (one object with ``results`` {id: choice} and ``outputs`` {id: text}, or one of the
    two), or JSONL with ``question_id`` and ``text``.

    Raises:
        ConfigError: it is neither; two lines answer one problem.
    """
    if path.suffix == ".json":
        whole = read_object(path)
        texts, stored = whole.get("outputs", {}), whole.get("results", {})
        if not (texts or stored) or not isinstance(texts, dict) or not isinstance(stored, dict):
            raise ConfigError(f"{path} has {', '.join(map(repr, whole)) or 'nothing'}; it needs 'results' or 'outputs'")
        return Predictions({str(k): str(v) for k, v in texts.items()}, {str(k): int(v) for k, v in stored.items()})
    found = Predictions()
    for row in read_rows(path, ("question_id", "text")):
        pid = str(row["question_id"])
        if pid in found.texts:
            raise ConfigError(f"{path} answers problem {pid} twice; leave one of the two lines")
        found.texts[pid] = str(row["text"] or "")
    return found


@dataclass
class Chosen:
    """Attributes:
    answers: the choice by id, from 0; None where none was named and the fallback is "wrong".
    unparsed: ids of the problems whose text named no choice.
    """

    answers: dict[str, int | None]
    unparsed: list[str]


def choose(predictions: Predictions, problems: Problems, *, fallback: str = "wrong", seed: int = 0) -> Chosen:
    """Choices from texts.

    Args:
        predictions: whose texts are read; what is stored is not looked at.
        problems: those that must be answered.
        fallback: "wrong", or "random" for the authors' first release, which drew a choice where none was named.
        seed: of those draws.

    Raises:
        ConfigError: a problem has no text.
    """
    _check_complete(predictions.texts, problems, "text")
    answers: dict[str, int | None] = {}
    unparsed = []
    for pid, problem in problems.items():
        count = len(problem["choices"]) or len(LETTERS)  # none listed: they stand in the question itself
        answers[pid] = find_choice(predictions.texts[pid], count)
        if answers[pid] is None:
            unparsed.append(pid)
            answers[pid] = guess(pid, count, seed) if fallback == "random" else None
    return Chosen(answers, unparsed)


def stored(predictions: Predictions, problems: Problems) -> Chosen:
    """The choices that the file itself names.

    Raises:
        ConfigError: a problem has none.
    """
    _check_complete(predictions.stored, problems, "stored choice")
    return Chosen({pid: predictions.stored[pid] for pid in problems}, [])


def _check_complete(there: Mapping[str, Any], problems: Problems, what: str) -> None:
    missing = [pid for pid in problems if pid not in there]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(problems)} problems have no {what}, the first is {missing[0]!r}; "
            f"finish the answers, or add --answered-only to score those that are there"
        )
