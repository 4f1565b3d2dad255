"""LLaVA together with a teacher on ScienceQA (paper, section 5.2): complement, and the teacher as judge.

- complement: the teacher's answer wherever it gives one, else the model's.
- judge: where the two differ, the teacher is asked again with both answers before it; its final answer counts where it
  gives one, else the model's.
"""

from __future__ import annotations

from collections.abc import Mapping

Answers = Mapping[str, int | None]  # number of the choice by id of the problem; None: none was named


def complement(model: Answers, teacher: Answers) -> dict[str, int | None]:
    """The teacher's choice, or the model's where the teacher names none."""
    return {pid: own if (theirs := teacher.get(pid)) is None else theirs for pid, own in model.items()}


def differing(model: Answers, teacher: Answers) -> list[str]:
    """The problems that go to the judge: both name a choice, and not the same; or only one of them does."""
    return [pid for pid, own in model.items() if teacher.get(pid) != own]


def judged(model: Answers, teacher: Answers, verdicts: Answers) -> dict[str, int | None]:
    """The model's choice where both agree or the judge names none, the judge's where it does."""
    asked = set(differing(model, teacher))
    return {
        pid: own if pid not in asked or (final := verdicts.get(pid)) is None else final for pid, own in model.items()
    }


def upper_bound(model: Answers, teacher: Answers, right: Mapping[str, int]) -> int:
    """Problems that at least one of the two gets right: what the best judge could reach."""
    return sum(right[pid] in (own, teacher.get(pid)) for pid, own in model.items())
