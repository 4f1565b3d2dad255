"""Reviews: what a judge said of two answers, and the two scores in its first line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.evaluate.bench import category_of
from llava_fast.evaluate.files import read_rows

ORDERS = ("reference_first", "candidate_first")
UNPARSABLE = ("leave-out", "as-original")
ORIGINAL_FAILURE = -1.0  # what the authors' eval_gpt_review.py scores both answers with, and then averages


@dataclass(frozen=True)
class Review:
    """Attributes:
    question_id: of the question.
    category: "conv", "detail" or "complex"; "" in files that know none.
    scores: (reference, candidate), whichever stood first; None where the judge's first line holds no two numbers.
    run: number of the judge's run, from 0.
    order: which answer stood first.
    content: all that the judge said.
    """

    question_id: str
    category: str
    scores: tuple[float, float] | None
    run: int
    order: str
    content: str


def find_scores(content: str) -> tuple[float, float] | None:
    """The two numbers of the first line, between them spaces or a comma; None where it holds anything else."""
    words = content.split("\n")[0].replace(",", " ").split()
    if len(words) != 2:
        return None
    try:
        first, second = float(words[0]), float(words[1])
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) and min(first, second) >= 0 else None


def read_reviews(paths: Iterable[Path]) -> list[Review]:
    """Review files: ours, or the authors'. The runs of one file stay apart from those of another.

    A line has ``question_id`` and what the judge said as ``content`` (or ``text``); ``category``, ``run`` and ``order``
    where there are any. Scores that the line holds beside are not looked at: the text is read again.

    Raises:
        ConfigError: a file is malformed, or two lines of a run review one question in one order.
    """
    reviews: list[Review] = []
    for path in paths:
        first_run = 1 + max((review.run for review in reviews), default=-1)
        seen: set[tuple[Any, ...]] = set()
        for row in read_rows(path, ("question_id",)):
            review = review_of(row, first_run)
            key = (review.question_id, review.run, review.order)
            if key in seen:
                raise ConfigError(
                    f"{path} reviews question {review.question_id} twice in one run; leave one of the two"
                )
            seen.add(key)
            reviews.append(review)
    return reviews


def review_of(row: dict[str, Any], first_run: int = 0) -> Review:
    """A line of a review file.

    Raises:
        ConfigError: it has neither ``content`` nor ``text``, or an unknown order.
    """
    content = row.get("content", row.get("text"))
    order = row.get("order", ORDERS[0])
    if not isinstance(content, str) or order not in ORDERS:
        raise ConfigError(f"{str(row)[:80]!r} is no review: it needs 'content', and 'order' be one of {ORDERS}")
    scores = find_scores(content)
    if scores is not None and order == ORDERS[1]:
        scores = scores[1], scores[0]
    return Review(
        str(row["question_id"]),
        category_of(str(row.get("category", ""))),
        scores,
        first_run + int(row.get("run", 0)),
        order,
        content,
    )


def scored(reviews: Iterable[Review], unparsable: str) -> list[tuple[Review, tuple[float, float]]]:
    """Reviews with their scores. Those without are left out, or as the original counts them: -1 for both answers."""
    return [
        (review, review.scores or (ORIGINAL_FAILURE, ORIGINAL_FAILURE))
        for review in reviews
        if review.scores is not None or unparsable == "as-original"
    ]
