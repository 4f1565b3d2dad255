"""python -m llava_fast.round_trip: scenes, data generation, both stages, evaluation and a report; nothing downloaded.

Every step is a command that works alone; this page says which, in what order, and what the report compares: the model
after stage 1 alone with the one that was tuned on generated instructions, as the paper's Table 4 does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.datagen.__main__ import main as datagen
from llava_fast.errors import ConfigError
from llava_fast.evaluate.__main__ import main as evaluate
from llava_fast.evaluate.compare import compare, pair, shown
from llava_fast.evaluate.files import read_object, write_object, write_whole
from llava_fast.evaluate.plots import draw_beside
from llava_fast.evaluate.results import read_result
from llava_fast.train.__main__ import main as train
from llava_fast.train.demo import PARTS

COMMANDS: dict[str, Callable[[list[str]], int]] = {"datagen": datagen, "train": train, "evaluate": evaluate}
UNTUNED, TUNED = "stage 1 alone", "instruction-tuned"
INTERRUPTED = 130


@dataclass(frozen=True)
class Step:
    """Attributes: about: what it is for; argv: ``python -m llava_fast.`` and this."""

    about: str
    argv: tuple[str, ...]

    @property
    def command(self) -> str:
        return f"python -m llava_fast.{shlex.join(self.argv)}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.round_trip",
        description="The whole chain on the built-in scenes, with no network: instruction data by the built-in "
        "teacher, stage 1, stage 2, questions about new pictures judged by rule, a report. The same command again "
        "goes on where it stopped. Figures come from simple drawings and a judge by rule: they are no LLaVA-Bench.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/round-trip"), help="folder (default %(default)s)")
    parser.add_argument("--scenes", type=int, default=6144, help="pictures to learn from (default %(default)s)")
    parser.add_argument("--questions", type=int, default=90, help="about new pictures (default %(default)s)")
    parser.add_argument("--workers", type=int, help="data worker processes of training (default one a core but one)")
    return parser


def steps(args: argparse.Namespace) -> list[Step]:
    """The commands, in order."""
    out: Path = args.out
    scenes, questions = str(args.scenes), str(args.questions)
    parts = ("--vision-tower", str(PARTS / "vision"), "--decoder", str(PARTS / "decoder"))
    workers = () if args.workers is None else ("--workers", str(args.workers))
    align, instruct, projector = out / "captions", out / "instructions", out / "stage1" / "projector.safetensors"
    bench = ("evaluate", "llava-bench", "--set", "scenes", "--count", questions)
    untuned, tuned = out / "bench-stage1", out / "bench-stage2"
    return [
        Step("captions for stage 1", ("datagen", "captions", "--scenes", scenes, "--out", str(align / "chat.json"))),
        Step(
            "instructions for stage 2, by the built-in teacher",
            ("datagen", "--scenes", scenes, "--rules", "--in-turn", "--out", str(instruct)),
        ),
        Step(
            "stage 1: the projector",
            ("train", "--recipe", "tiny-stage1", *parts, "--data", str(align / "chat.json"), "--images", str(align),
             "--out", str(out / "stage1"), *workers),
        ),
        Step(
            "stage 2: projector and decoder",
            ("train", "--recipe", "tiny-stage2", *parts, "--projector", str(projector), "--data",
             str(instruct / "instruct.json"), "--images", str(instruct), "--out", str(out / "stage2"), *workers),
        ),
        Step(
            "the model after stage 1 as a checkpoint",
            ("evaluate", "assemble", *parts, "--projector", str(projector), "--dtype", "float32", "--out",
             str(out / "stage1" / "model")),
        ),
        Step(UNTUNED, (*bench, "--model", str(out / "stage1" / "model"), "--name", UNTUNED, "--out", str(untuned))),
        Step(
            TUNED,
            (*bench, "--model", str(out / "stage2" / "model"), "--name", TUNED, "--out", str(tuned), "--beside",
             f"{UNTUNED}={untuned}"),
        ),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if min(args.scenes, args.questions) < 1:
        print(f"\nerror: --scenes {args.scenes} and --questions {args.questions} must be 1 or more", file=sys.stderr)
        return 2
    every = steps(args)
    try:
        done = Done(args.out / "steps.json")
        for number, step in enumerate(every, 1):
            print(f"\n[{number}/{len(every)}] {step.about}\n$ {step.command}", flush=True)
            code = done.run(step)
            if code:
                return code
        report(args.out, every, done)
    except ConfigError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


class Done:
    """The steps that ended well, with their seconds, in a file; so that they are not done again.

    Raises:
        ConfigError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = read_object(path) if path.is_file() else {}

    def run(self, step: Step) -> int:
        """The exit code of the step's command; 0 when it was done before."""
        if step.command in self.seconds:
            print(f"done before, in {self.seconds[step.command]:.0f} s")
            return 0
        start = time.perf_counter()
        code = COMMANDS[step.argv[0]](list(step.argv[1:]))
        if code == 0:
            self.seconds[step.command] = time.perf_counter() - start
            write_object(self.path, self.seconds)
        return code


# ---- the report


def report(out: Path, every: list[Step], done: Done) -> None:
    """report.md, report.json and scores.png, from what the steps left."""
    untuned, tuned = (read_result(out / name / "result.json") for name in ("bench-stage1", "bench-stage2"))
    found = compare(pair(untuned["items"], tuned["items"]), draws=4000, seed=0)
    scores = {group: found[group] for group in tuned["metrics"] if group in found}  # in the paper's order
    training = {stage: read_object(out / stage / "summary.json") for stage in ("stage1", "stage2")}
    generated = read_object(out / "instructions" / "summary.json")
    facts = {
        "scores": {
            group: {UNTUNED: one["a"], TUNED: one["b"], "difference": one["difference"]}
            for group, one in scores.items()
        },
        "questions": len(tuned["items"]),
        "samples": generated["samples"],
        "training": {
            stage: {k: v for k, v in one.items() if not isinstance(v, list)} for stage, one in training.items()
        },
        "seconds": {step.command: done.seconds[step.command] for step in every},
        "versions": tuned["versions"],
    }
    write_object(out / "report.json", facts)
    draw_beside(
        {name: {g: one[name] for g, one in facts["scores"].items()} for name in (UNTUNED, TUNED)},
        out / "scores.png",
        "Answers about new built-in pictures, judged by rule",
    )
    write_whole(out / "report.md", text := as_markdown(out, every, facts))
    print("\n" + text)


def as_markdown(out: Path, every: list[Step], facts: dict[str, Any]) -> str:
    groups = list(facts["scores"])
    rows = [["", *groups]]
    for name in (UNTUNED, TUNED, "difference"):
        rows.append([name, *(shown(facts["scores"][g][name], sign=name == "difference") for g in groups)])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    first, second = (facts["training"][stage] for stage in ("stage1", "stage2"))
    total = sum(facts["seconds"].values())
    seconds = [f"{facts['seconds'][step.command]:6.0f} s  {step.about}" for step in every]
    return "\n".join(
        [
            "# Round trip on the built-in scenes",
            "",
            f"Relative score in percent of the reference answers', {facts['questions']} questions about new pictures, "
            "judged by rule; in brackets the middle 95% of a bootstrap over questions, * where that of a difference "
            "holds no 0.",
            "The judge knows what is drawn: these are no figures of LLaVA-Bench.",
            "",
            *lines,
            "",
            f"Stage 1: loss {first['first_loss']:.2f} -> {first['final_loss']:.2f} in {first['steps']} steps. "
            f"Stage 2: {second['first_loss']:.2f} -> {second['final_loss']:.2f} in {second['steps']} steps.",
            f"Data: {json.dumps(facts['samples'])}.",
            "",
            f"{total:.0f} s:",
            "",
            "```",
            *seconds,
            "```",
            "",
            f"Answers side by side: {out / 'bench-stage2' / 'page.html'}; plot: {out / 'scores.png'}; the model: "
            f"{out / 'stage2' / 'model'}",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
