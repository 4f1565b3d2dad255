"""The nine columns of ScienceQA (paper, Table 7): accuracy by subject, by kind of context and by grade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}

# Paper, Table 7, in percent; its last column is over all problems.
PAPER = {
    "LLaVA": (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92),
    "LLaVA + GPT-4 (complement)": (90.36, 95.50, 88.55, 89.05, 87.80, 91.08, 92.22, 88.73, 90.97),
    "LLaVA + GPT-4 (judge)": (91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16, 92.53),
    "GPT-3.5 with CoT": (75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68, 75.17),
    "Human": (90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42, 88.40),
}


def columns_of(problem: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns in which a problem counts. One with hint and picture counts under TXT and under IMG; NO has neither.

    Raises:
        KeyError: the problem lacks a field; ValueError: its grade is none.
    """
    subject = _SUBJECTS[problem["subject"]]
    context = [name for name, there in (("TXT", bool(problem["hint"])), ("IMG", problem["image"] is not None)) if there]
    grade = int(str(problem["grade"]).removeprefix("grade"))
    return (subject, *(context or ["NO"]), "G1-6" if grade <= 6 else "G7-12", "Avg")


def score(problems: Mapping[str, Mapping[str, Any]], answers: Mapping[str, int | None]) -> dict[str, dict[str, Any]]:
    """Correct answers, count and accuracy in percent by column.

    Args:
        problems: by id, as in problems.json.
        answers: number of the choice by id of the problem; None is wrong. Problems without an answer do not count.
    """
    correct, count = dict.fromkeys(COLUMNS, 0), dict.fromkeys(COLUMNS, 0)
    for pid, answer in answers.items():
        for column in columns_of(problems[pid]):
            count[column] += 1
            correct[column] += answer == problems[pid]["answer"]
    return {
        name: {
            "correct": correct[name],
            "count": count[name],
            "accuracy": 100 * correct[name] / count[name] if count[name] else None,
        }
        for name in COLUMNS
    }


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], *, paper: bool = True) -> str:
    """Scores by name, and below them the paper's rows, as text."""
    lines = {name: [scores[column]["accuracy"] for column in COLUMNS] for name, scores in rows.items()}
    if paper:
        lines |= {f"paper: {name}": list(values) for name, values in PAPER.items()}
    width = max(map(len, lines), default=0)
    shown = [f"{'':{width}} " + "".join(f"{column:>7}" for column in COLUMNS)]
    for name, values in lines.items():
        shown.append(f"{name:{width}} " + "".join(f"{'-' if v is None else format(v, '.2f'):>7}" for v in values))
    return "\n".join(shown)
