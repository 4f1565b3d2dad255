"""The relative score of LLaVA-Bench: the candidate's mean score over the reference's, in percent (paper, section 5.1).

It is the ratio of the means, not the mean of ratios; the means are rounded to three places first, as in the authors'
``summarize_gpt_review.py``, which moves the last printed digit now and then. Runs of the judge are scored one by one,
then their mean and standard deviation (of a sample: n - 1) are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from llava_fast.evaluate.bench import CATEGORIES
from llava_fast.evaluate.reviews import ORDERS, Review, scored

ALL = "all"

# Paper: (conv, detail, complex, all) in percent; judged by GPT-4-0314 with the authors' prompt.
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "coco": {  # Table 4
        "full data": (83.1, 75.3, 96.5, 85.1),
        "detail + complex": (81.5, 73.3, 90.8, 81.9),
        "conv + 5% detail + 10% complex": (81.0, 68.4, 91.5, 80.5),
        "conversation": (76.5, 59.8, 84.9, 73.8),
        "no instruction tuning": (22.0, 24.0, 18.5, 21.5),
    },
    "wild": {  # Table 5, means
        "LLaVA": (57.3, 52.5, 81.7, 67.3),
        "BLIP-2": (54.6, 29.1, 32.9, 38.1),
        "OpenFlamingo": (19.3, 19.0, 19.1, 19.1),
    },
}


@dataclass(frozen=True)
class Score:
    """Attributes:
    relative: percent; None where nothing was scored.
    reference, candidate: means of the judge's scores, 1 to 10.
    count: reviews that they are taken over.
    """

    relative: float | None
    reference: float
    candidate: float
    count: int


def score(reviews: Iterable[Review], *, unparsable: str = "leave-out") -> dict[str, Score]:
    """One score a category that occurs, and ``all``."""
    pairs = scored(reviews, unparsable)
    present = {review.category for review, _ in pairs}
    known = [name for name in CATEGORIES if name in present]
    names = [*known, *sorted(present - set(known) - {""}), ALL]
    return {name: _score([pair for review, pair in pairs if name in (ALL, review.category)]) for name in names}


def _score(pairs: Sequence[tuple[float, float]]) -> Score:
    if not pairs:
        return Score(None, 0.0, 0.0, 0)
    reference, candidate = (round(mean(pair[n] for pair in pairs), 3) for n in (0, 1))
    return Score(100 * candidate / reference if reference else None, reference, candidate, len(pairs))


@dataclass(frozen=True)
class Spread:
    """Attributes: mean, deviation: percent, over the runs; deviation is None for a single run."""

    mean: float | None
    deviation: float | None


def by_run(reviews: Sequence[Review], *, unparsable: str = "leave-out") -> dict[int, dict[str, Score]]:
    """Scores of each run of the judge, both orders together."""
    runs = sorted({review.run for review in reviews})
    return {run: score((r for r in reviews if r.run == run), unparsable=unparsable) for run in runs}


def spread(runs: Iterable[dict[str, Score]]) -> dict[str, Spread]:
    """Mean and deviation of each category over runs."""
    runs = list(runs)
    names = list(dict.fromkeys(name for run in runs for name in run))
    ordered = [name for name in names if name != ALL] + [ALL]
    found = {}
    for name in ordered:
        values = [v for run in runs if name in run and (v := run[name].relative) is not None]
        found[name] = Spread(mean(values) if values else None, stdev(values) if len(values) > 1 else None)
    return found


@dataclass(frozen=True)
class Bias:
    """What the order of the two answers did, over questions that one run reviewed in both.

    Attributes:
        pairs: such questions.
        relative: percent with the reference first, and with the candidate first.
        first_gain: how many points more an answer gets when it stands first, on average over both answers.
        turned: pairs in which the order decided which answer had the higher score.
    """

    pairs: int
    relative: tuple[float | None, float | None]
    first_gain: float
    turned: int


def position_bias(reviews: Iterable[Review]) -> Bias | None:
    """None where nothing was reviewed in both orders."""
    found: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    for review, pair in scored(reviews, "leave-out"):
        found.setdefault((review.question_id, review.run), {})[review.order] = pair
    both = [orders for orders in found.values() if len(orders) == 2]
    if not both:
        return None
    reference_first, candidate_first = ([orders[name] for orders in both] for name in ORDERS)
    gains = [((r[0] - c[0]) + (c[1] - r[1])) / 2 for r, c in zip(reference_first, candidate_first, strict=True)]
    turned = sum((r[1] - r[0]) * (c[1] - c[0]) < 0 for r, c in zip(reference_first, candidate_first, strict=True))
    return Bias(len(both), (_score(reference_first).relative, _score(candidate_first).relative), mean(gains), turned)


def table(runs: dict[int, dict[str, Score]], paper: str | None = None) -> str:
    """Runs, their spread, mean scores and the paper's figures, as text."""
    over = spread(runs.values())
    names = list(over)
    rows: dict[str, list[str]] = {}
    for run, scores in runs.items():
        rows[f"run {run + 1}"] = [_shown(scores[n].relative) if n in scores else "-" for n in names]
    if len(runs) > 1:
        rows["mean ± deviation"] = [
            _shown(over[n].mean) + ("" if (d := over[n].deviation) is None else f"±{d:.1f}") for n in names
        ]
    for label in ("reference", "candidate"):
        values = [[getattr(scores[n], label) for scores in runs.values() if n in scores] for n in names]
        rows[f"mean score, {label}"] = [f"{mean(v):.2f}" for v in values]
    rows["reviews"] = [str(sum(scores[n].count for scores in runs.values() if n in scores)) for n in names]
    for name, values_of in PAPER.get(paper or "", {}).items():
        paper_values = dict(zip((*CATEGORIES, ALL), values_of, strict=True))
        rows[f"paper: {name}"] = [_shown(paper_values.get(n)) for n in names]
    return layout(names, rows)


def layout(names: Sequence[str], rows: dict[str, list[str]]) -> str:
    width = max(map(len, rows), default=0)
    cell = 2 + max(len(text) for row in [list(names), *rows.values()] for text in row)
    lines = [f"{'':{width}}" + "".join(f"{name:>{cell}}" for name in names)]
    lines += [f"{label:{width}}" + "".join(f"{text:>{cell}}" for text in row) for label, row in rows.items()]
    return "\n".join(lines)


def as_json(runs: dict[int, dict[str, Score]]) -> dict[str, Any]:
    """Everything that the table shows, for programs."""
    return {
        "runs": [{name: vars(one) for name, one in scores.items()} for scores in runs.values()],
        "spread": {name: vars(one) for name, one in spread(runs.values()).items()},
    }


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
