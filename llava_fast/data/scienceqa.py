"""ScienceQA as LLaVA JSON: ``python -m llava_fast.data.scienceqa``.

Prompts and answers follow the authors' converter (LLaVA, scripts/convert_sqa_to_llava.py) to the character. A format
such as ``QCM-LEPA`` names what the question shows (Question, Context, Multiple choices, Lecture, Explanation) and,
after the hyphen, what the answer gives and in which order (P: the layout of the paper's reason-first run).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError, LlavaError, SampleError

LETTERS = "ABCDE"
INPUT_FORMATS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUT_FORMATS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")

Problem = dict[str, Any]  # one entry of problems.json: question, choices, answer, hint, image, split, lecture, solution
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Counts:
    """What became of a split.

    Attributes:
        samples: how many were converted.
        with_image: those of them that have a picture.
        image_missing: problems whose picture is not on disk (left out or kept, as asked).
        problem_missing: entries of the split that problems.json does not hold.
    """

    samples: int
    with_image: int
    image_missing: int
    problem_missing: int


def correct_letter(problem: Problem) -> str:
    """The letter of the right choice, "A" to "E"."""
    return LETTERS[problem["answer"]]


def build_question(problem: Problem, input_format: str) -> str:
    """What the human turn says, without the image mark.

    Raises:
        ConfigError: the format is not one of :data:`INPUT_FORMATS`.
    """
    _one_of("input", input_format, INPUT_FORMATS)
    question = f"Question: {problem['question']}"
    context = f"Context: {problem['hint'].strip() or 'N/A'}"
    letters = LETTERS[: len(problem["choices"])]
    options = "Options: " + " ".join(f"({x}) {c}" for x, c in zip(letters, problem["choices"], strict=True))
    if input_format == "CQM":
        text = _tidy("\n".join((context, question, options)))
    else:
        shown = input_format.replace("QC", "").replace("M", "")
        reasons = [problem[{"L": "lecture", "E": "solution"}[x]] for x in shown]
        because = [f"BECAUSE: {' '.join(reasons)}"] if reasons else []
        middle = [options, *because] if input_format.startswith("QCM") else [*because, options]
        text = _tidy("\n".join((question, context, *middle)))
    # The authors drop the label wherever it stands once the text begins with it.
    return text.replace("Question: ", "") if text.startswith("Question: ") else text


def build_answer(problem: Problem, output_format: str) -> str:
    """What the model is to say.

    Raises:
        ConfigError: the format is not one of :data:`OUTPUT_FORMATS`.
    """
    _one_of("output", output_format, OUTPUT_FORMATS)
    letter, lecture, solution = correct_letter(problem), problem["lecture"], problem["solution"]
    if output_format == "LEPA":
        parts = [f"LECTURE: {lecture}\n"] if lecture.strip() else []
        parts += [f"SOLUTION: {solution}\n"] if solution.strip() else []
        return _tidy("".join(parts) + f"###\nANSWER: {letter}.")
    verdict = f"The answer is {letter}."
    # AL gives the solution and AE the lecture: the two names are swapped in the authors' converter, and models are
    # trained on what it wrote.
    swapped = output_format in ("AL", "AE")
    reasons = " ".join(lecture if (part == "L") != swapped else solution for part in output_format.replace("A", ""))
    if output_format == "A":
        text = _tidy(f"Answer: {verdict}")
    elif output_format.startswith("A"):
        text = _tidy(f"Answer: {verdict} BECAUSE: {reasons}")
    else:
        text = _tidy(f"Answer: {reasons} {verdict}")
    return text.replace("Answer: ", "") if text.startswith("Answer: ") else text


def build_sample(pid: str, problem: Problem, prompt_format: str) -> dict[str, Any]:
    """A problem as a LLaVA JSON sample; ``image`` is ``{split}/{pid}/image.png``, its mark comes last in the question.

    Raises:
        ConfigError: ``prompt_format`` is unknown.
        SampleError: the problem lacks a field or its answer is no choice.
    """
    input_format, output_format = split_format(prompt_format)
    try:
        choices = len(problem["choices"]) or len(LETTERS)  # none listed: they stand in the question itself
        if not 0 <= problem["answer"] < choices <= len(LETTERS):
            raise SampleError(pid, f"answer {problem['answer']} is none of {choices} choices, or they are more than 5")
        question, answer = build_question(problem, input_format), build_answer(problem, output_format)
        picture = image_path(pid, problem)
    except (KeyError, TypeError, AttributeError) as error:
        raise SampleError(pid, f"not a ScienceQA problem: {type(error).__name__}: {error}") from error
    sample: dict[str, Any] = {"id": pid}
    if picture is not None:
        sample["image"] = picture
        question += "\n<image>"
    sample["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return sample


def image_path(pid: str, problem: Problem) -> str | None:
    """Where the picture lies under the images folder, or None for a text-only problem."""
    return None if problem["image"] is None else f"{problem['split']}/{pid}/{problem['image']}"


def split_format(prompt_format: str) -> tuple[str, str]:
    """("QCM", "LEPA") from "QCM-LEPA".

    Raises:
        ConfigError: one of the two is unknown.
    """
    input_format, _, output_format = prompt_format.partition("-")
    _one_of("input", input_format, INPUT_FORMATS)
    _one_of("output", output_format, OUTPUT_FORMATS)
    return input_format, output_format


def convert(
    problems: PathLike,
    splits: PathLike,
    split: str,
    images: PathLike,
    prompt_format: str = "QCM-LEPA",
    *,
    skip_missing: bool = False,
) -> tuple[list[dict[str, Any]], Counts]:
    """One split of the official files as LLaVA JSON samples, in the split's order.

    Args:
        problems: problems.json.
        splits: pid_splits.json.
        split: a key of it: train, val, test, trainval, minitrain, minival or minitest.
        images: the folder that holds ``{split}/{pid}/image.png``; looked at only to count what is missing.
        prompt_format: see :func:`split_format`.
        skip_missing: leave out problems whose picture is not on disk, and entries of the split that problems.json does
            not hold. Text-only problems always stay.

    Raises:
        ConfigError: a file cannot be read, the split or format is unknown, or problems.json lacks some of the split.
        SampleError: a problem is malformed.
    """
    split_format(prompt_format)
    table, members = _read_json(problems), _read_json(splits)
    if split not in members:
        raise ConfigError(f"split={split!r} is not in {splits}; choose one of {', '.join(members)}")
    present = [pid for pid in members[split] if pid in table]
    absent = len(members[split]) - len(present)
    if absent and not skip_missing:
        raise ConfigError(
            f"{problems} lacks {absent} of the {len(members[split])} problems of {split!r}; "
            f"--skip-missing (skip_missing=True) leaves them out"
        )
    samples, image_missing = [], 0
    for pid in present:
        sample = build_sample(pid, table[pid], prompt_format)
        if "image" in sample and not (Path(images) / sample["image"]).is_file():
            image_missing += 1
            if skip_missing:
                continue
        samples.append(sample)
    return samples, Counts(len(samples), sum("image" in s for s in samples), image_missing, absent)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see ``--help``. Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        samples, counts = convert(
            args.problems, args.splits, args.split, args.images, args.format, skip_missing=args.skip_missing
        )
        _write_json(args.out, samples)
    except (LlavaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    fate = "left out" if args.skip_missing else "kept; --skip-missing leaves them out"
    print(f"{args.out}: {counts.samples} samples, {counts.with_image} with an image")
    print(f"images not on disk: {counts.image_missing} ({fate})")
    print(f"problems not in {args.problems}: {counts.problem_missing}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.data.scienceqa",
        description="Convert ScienceQA's official files to LLaVA JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--problems", type=Path, required=True, help="problems.json")
    add("--splits", type=Path, required=True, help="pid_splits.json")
    add("--split", default="train", help="train, val, test, trainval, minitrain, minival or minitest")
    add("--images", type=Path, required=True, help="folder that holds {split}/{pid}/image.png")
    inputs, outputs = ", ".join(INPUT_FORMATS), ", ".join(OUTPUT_FORMATS)
    add("--format", default="QCM-LEPA", help=f"INPUT-OUTPUT; inputs: {inputs}; outputs: {outputs}")
    add("--out", type=Path, required=True, help="LLaVA JSON file to write")
    add("--skip-missing", action="store_true", help="leave out problems whose image or entry is missing")
    return parser


def _tidy(text: str) -> str:
    """Double spaces halved once, ends stripped, and a reason that turned out empty dropped with its label."""
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def _one_of(side: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(f"{side} format {name!r} is not known; choose one of {', '.join(known)}, such as QCM-LEPA")


def _read_json(path: PathLike) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the file: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, as ScienceQA's own files do")
    return value


def _write_json(path: Path, value: Any) -> None:
    """Written beside ``path`` and renamed, so that a half-written file never carries its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
