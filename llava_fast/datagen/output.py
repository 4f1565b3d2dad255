"""Output: what the answers come to, as files; a function of tasks and answers alone, whatever order those came in.

instruct.json        every sample, in the LLaVA JSON that training reads
KIND.json            the same by kind, for mixtures of them
rejected.jsonl       every answer, or part of one, that was left out, with the reason
summary.json         counts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llava_fast.datagen.asking import Recall, verdicts_of
from llava_fast.datagen.checks import Duplicates, Fault
from llava_fast.datagen.parse import Turn
from llava_fast.datagen.plan import Plan, Task
from llava_fast.datagen.prompting import Prompts
from llava_fast.datagen.samples import ArrayFile, LinesFile, make_sample
from llava_fast.teacher import Reply


class Results:
    """The files of a run, being written. All take their names together, when the last row is in.

    Attributes:
        samples: written, by kind. rejected: answers that were left out, by kind and reason. cut: conversations of
            which only the first turns were kept, by reason. unanswered: tasks without any answer, by kind.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], seed: int, questions: Sequence[str]):
        self.samples: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.rejected: Counter[tuple[str, str]] = Counter()
        self.cut: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self._seed, self._questions = seed, questions
        self._duplicates = Duplicates()
        self._stack = ExitStack()
        self._files = {name: self._stack.enter_context(ArrayFile(folder / f"{name}.json")) for name in kinds}
        self._all = self._stack.enter_context(ArrayFile(folder / "instruct.json"))
        self._refused = self._stack.enter_context(LinesFile(folder / "rejected.jsonl"))

    def add(self, task: Task, prompts: Prompts, recall: Recall, draws: int) -> None:
        """Take up what a task was answered."""
        answered = False
        for reply, verdict in verdicts_of(task, prompts, recall, draws):
            answered = True
            for fault in verdict.faults:
                self._reject(task, fault, reply, kept=len(verdict.turns))
            if verdict.turns:
                self._accept(task, verdict.turns, reply)
        if not answered:
            self.unanswered[task.kind.name] += 1

    def _accept(self, task: Task, turns: list[Turn], reply: Reply) -> None:
        fault = self._duplicates.check(task.picture.id, turns)
        if fault:
            self._reject(task, fault, reply, kept=0)
            return
        sample = make_sample(task.picture, task.kind.name, turns, self._seed, self._questions)
        self._files[task.kind.name].add(sample)
        self._all.add(sample)
        self.samples[task.kind.name] += 1
        self.turns[task.kind.name] += len(turns)

    def _reject(self, task: Task, fault: Fault, reply: Reply, kept: int) -> None:
        if kept:
            self.cut[fault.reason] += 1
        else:
            self.rejected[task.kind.name, fault.reason] += 1
        said = {"reason": fault.reason, "found": fault.detail, "turns_kept": kept, "text": str(reply)}
        self._refused.add({"id": task.picture.id, "kind": task.kind.name, **said})

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def summary(self) -> dict[str, Any]:
        """The counts, as JSON holds them."""
        kinds = list(self._files)
        return {
            "samples": {name: self.samples[name] for name in kinds},
            "turns": {name: self.turns[name] for name in kinds},
            "rejected": {
                name: {reason: n for (kind, reason), n in sorted(self.rejected.items()) if kind == name}
                for name in kinds
            },
            "cut": dict(self.cut),
            "unanswered": {name: self.unanswered[name] for name in kinds},
        }


def write_results(
    folder: Path,
    plan: Plan,
    prompts: Prompts,
    recall: Recall,
    *,
    kinds: Sequence[str],
    draws: int,
    seed: int,
    each: Callable[[], Any] = lambda: None,
) -> Results:
    """Write the files of a run from the answers that there are.

    Args:
        each: called after every task.
    """
    with Results(folder, kinds, seed, prompts.questions) as results:
        for task in plan:
            results.add(task, prompts, recall, draws)
            each()
    return results


def tell(results: Results, folder: Path) -> str:
    """The counts in words."""
    lines = [f"{sum(results.samples.values()):,} samples in {folder / 'instruct.json'}"]
    for name, count in results.summary()["samples"].items():
        left_out = {reason: n for (kind, reason), n in results.rejected.most_common() if kind == name}
        rejected = ", ".join(f"{reason} {n:,}" for reason, n in left_out.items())
        line = f"  {name:<13}{count:>9,} samples, {results.turns[name]:,} questions"
        line += f"; rejected answers: {rejected}" if rejected else ""
        lines.append(line + (f"; without an answer: {results.unanswered[name]:,}" if results.unanswered[name] else ""))
    if results.cut:
        lines.append(
            "  conversations cut before a faulty turn: " + ", ".join(f"{r} {n:,}" for r, n in results.cut.items())
        )
    if results.rejected or results.cut:
        lines.append(f"  what was left out and why: {folder / 'rejected.jsonl'}")
    return "\n".join(lines)
