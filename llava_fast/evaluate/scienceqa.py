"""python -m llava_fast.evaluate scienceqa: the nine columns of the paper's Table 7, and both ensembles."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.data.scienceqa import build_question, image_path
from llava_fast.errors import ConfigError
from llava_fast.evaluate import ensembles
from llava_fast.evaluate.answering import (
    TokenSetup,
    add_model_options,
    answer_rows,
    digest_of_texts,
    processor_of,
    setup_from,
    subject_of,
    with_sampling,
)
from llava_fast.evaluate.asking import Question, ask_and_keep
from llava_fast.evaluate.choices import FALLBACKS
from llava_fast.evaluate.columns import PAPER, columns_of, score, table
from llava_fast.evaluate.files import check_writable, digest_of, read_object, write_object, write_whole
from llava_fast.evaluate.predictions import Chosen, Predictions, choose, read_predictions, stored
from llava_fast.evaluate.results import Item, result
from llava_fast.evaluate.scienceqa_prompts import STYLES, examples, joined, rows_of, second_row
from llava_fast.evaluate.teacher_options import add_teacher_options, teacher_of
from llava_fast.evaluate.wording import conversation, fill, wording

EPILOG = """\
examples:
  python -m llava_fast.evaluate scienceqa --problems problems.json --splits pid_splits.json --predictions llava.json
      scores answers that exist already; no model is loaded
  python -m llava_fast.evaluate scienceqa --problems problems.json --splits pid_splits.json --images images \\
      --model runs/scienceqa/model --style two-pass --out runs/scienceqa/test --json scores.json
      answers the test split with the engine and scores it; the same command again goes on where it stopped
  ... --teacher-answers gpt4.json --teacher-url https://api.openai.com/v1 --teacher-model gpt-4
      adds both ensembles: complement, and the teacher as judge of the answers that differ
The files come from ScienceQA's repository (data/scienceqa); images lie as {split}/{id}/image.png.
Training data in the same forms: python -m llava_fast.data.scienceqa --help

predictions: the authors' form, one object with "results" {id: choice} and/or "outputs" {id: text}, or JSONL of
  {"question_id": "4", "text": "The answer is B."}
A text names a choice when it is a letter, or begins "B. ", or says "The answer is B." exactly once.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "scienceqa",
        help="accuracy in the paper's nine columns, with the teacher ensembles",
        description="ScienceQA: accuracy in the nine columns of the paper's Table 7, from a model or from a file of "
        "answers, and the two ensembles with a teacher.",
        usage="python -m llava_fast.evaluate scienceqa --problems P --splits S [--model DIR | --predictions FILE] "
        "[options]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    data = parser.add_argument_group("data")
    data.add_argument("--problems", type=Path, metavar="FILE", required=True, help="problems.json")
    data.add_argument("--splits", type=Path, metavar="FILE", required=True, help="pid_splits.json")
    data.add_argument("--split", default="test", help="default %(default)s")
    data.add_argument(
        "--limit", type=int, metavar="N", help="only the first so many problems (a trial, not the benchmark)"
    )
    data.add_argument("--skip-missing", action="store_true", help="leave out problems whose picture is not on disk")
    answers = parser.add_argument_group("answers that exist already")
    answers.add_argument("--predictions", type=Path, metavar="FILE", help="file of answers, instead of --model")
    answers.add_argument(
        "--read",
        choices=("auto", "stored", "texts"),
        default="auto",
        help="the choices that the file stores, or those that its texts name (default: stored where there are any)",
    )
    answers.add_argument("--answered-only", action="store_true", help="leave out problems without an answer")
    add_model_options(parser, max_tokens=1024)
    asking = parser.add_argument_group("how it is asked and read")
    asking.add_argument("--style", choices=STYLES, default="reason-first", help="default %(default)s")
    asking.add_argument(
        "--image-position",
        choices=("first", "last"),
        help="picture before or after the question (default: last with two-pass, as the paper's run, else first)",
    )
    asking.add_argument(
        "--fallback",
        choices=FALLBACKS,
        default="wrong",
        help="what a text counts as that names no choice: wrong, or a seeded draw as in the paper's first release "
        "(default %(default)s)",
    )
    asking.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    group = add_teacher_options(parser, "teacher", "for the ensembles of section 5.2", temperature=0.0)
    group.add_argument(
        "--teacher-answers", type=Path, metavar="FILE", help="the teacher's own answers; without them it is asked"
    )
    group.add_argument(
        "--judge-answers", type=Path, metavar="FILE", help="its answers as judge; without them it is asked"
    )
    group.add_argument("--shots", type=int, default=2, help="worked examples before its question (default %(default)s)")
    group.add_argument(
        "--judge-prompt", type=Path, metavar="FILE", help="own text, with {question}, {first} and {second}"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, help="folder of answers and journals (default runs/scienceqa-SPLIT)")
    out.add_argument("--overwrite", action="store_true", help="delete what --out holds of earlier answers")
    out.add_argument("--json", type=Path, metavar="PATH", help="write the scores there")


@dataclass
class Answered:
    """What is scored. Attributes: texts may be empty where the file stores choices alone; notes: told in the result."""

    predictions: Predictions
    chosen: Chosen
    subject: dict[str, Any]
    notes: dict[str, Any]


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    if (args.model is None) == (args.predictions is None):
        raise ConfigError(f"--model {args.model} and --predictions {args.predictions}: give one of the two")
    if args.json:
        check_writable(args.json, "--json")
    args.out = args.out or Path("runs") / f"scienceqa-{args.split}"
    table_of_problems = read_object(args.problems)
    problems = members(table_of_problems, args)
    asks = teacher_of(args, "teacher") is not None
    if args.judge_answers and not (asks or args.teacher_answers):
        raise ConfigError(f"--judge-answers {args.judge_answers} needs the answers that it judged: --teacher-answers")
    answered = answers_of_model(args, problems, stop) if args.model else answers_of_file(args, problems)
    problems = {pid: problems[pid] for pid in answered.chosen.answers}
    rows = {"this run": score(problems, answered.chosen.answers)}
    more: dict[str, Any] = {"unparsed": answered.chosen.unparsed, **answered.notes}
    if asks or args.teacher_answers:
        ensembles_rows, counts = with_teacher(args, table_of_problems, problems, answered, asks, stop)
        rows |= ensembles_rows
        more["ensembles"] = counts
    if args.json:
        write_object(args.json, as_result(args, problems, answered, rows, more))
    report(rows, answered, args)
    return 0


def members(table_of_problems: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The split's problems, in its order.

    Raises:
        ConfigError: an unknown split, or problems or pictures that are not there.
    """
    splits = read_object(args.splits)
    if args.split not in splits:
        raise ConfigError(f"--split {args.split} is not in {args.splits}; choose one of {', '.join(splits)}")
    wanted = splits[args.split][: args.limit]
    missing = [pid for pid in wanted if pid not in table_of_problems]
    if missing and not args.skip_missing:
        raise ConfigError(
            f"{args.problems} lacks {len(missing)} of the {len(wanted)} problems of {args.split!r}, the first is "
            f"{missing[0]!r}; take the whole file, or add --skip-missing"
        )
    problems = {pid: table_of_problems[pid] for pid in wanted if pid in table_of_problems}
    return with_pictures(problems, args) if args.model else problems


def with_pictures(problems: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    pictures = {pid: image_path(pid, problem) for pid, problem in problems.items()}
    absent = {pid for pid, name in pictures.items() if name and not ((args.images or Path()) / name).is_file()}
    if absent and not args.skip_missing:
        first = next(pid for pid in problems if pid in absent)
        raise ConfigError(
            f"{len(absent)} pictures are not under --images {args.images}, the first is {pictures[first]}; give the "
            f"folder that holds {args.split}/, or add --skip-missing to leave their problems out"
        )
    return {pid: problem for pid, problem in problems.items() if pid not in absent}


# ---- answers


def answers_of_file(args: argparse.Namespace, problems: dict[str, Any]) -> Answered:
    predictions = read_predictions(args.predictions)
    if args.read == "stored" and not predictions.stored:
        raise ConfigError(f"{args.predictions} stores no choices ('results'); leave --read away to read its texts")
    from_store = bool(predictions.stored) and args.read != "texts"
    if args.answered_only:
        there: Mapping[str, Any] = predictions.stored if from_store else predictions.texts
        problems = {pid: problem for pid, problem in problems.items() if pid in there}
    notes: dict[str, Any] = {"read": "stored" if from_store else "texts"}
    if from_store:
        chosen = stored(predictions, problems)
        if all(pid in predictions.texts for pid in problems):
            again = choose(predictions, problems, fallback=args.fallback, seed=args.seed)
            notes["texts_read_again"] = {
                **score(problems, again.answers)["Avg"],
                "unparsed": again.unparsed,
                "fallback": args.fallback,
            }
    else:
        chosen = choose(predictions, problems, fallback=args.fallback, seed=args.seed)
    subject = {"predictions": str(args.predictions), "blake2b": digest_of(args.predictions)}
    return Answered(predictions, chosen, subject, notes)


def answers_of_model(args: argparse.Namespace, problems: dict[str, Any], stop: threading.Event) -> Answered:
    setup, devices = setup_from(args)
    last = (args.image_position or ("last" if args.style == "two-pass" else "first")) == "last"
    rows = rows_of(problems, args.style, image_last=last)
    path = args.out / "answers.jsonl"
    found = answer_rows(rows, path, setup, devices, stop, overwrite=args.overwrite)
    texts, failures = found.texts, found.failures
    if args.style == "two-pass":
        letters = letters_of(args, problems, texts, setup, devices, stop, last)
        texts = {pid: joined(texts[pid], letter) for pid, letter in letters.texts.items()}
        failures = {**failures, **letters.failures}
    predictions = Predictions({pid: texts.get(pid, "") for pid in problems})
    lines = ({"question_id": pid, "text": text} for pid, text in predictions.texts.items())
    write_whole(args.out / "predictions.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    chosen = choose(predictions, problems, fallback=args.fallback, seed=args.seed)
    notes = {"read": "texts", "failed": failures, "style": args.style, "image_position": "last" if last else "first"}
    return Answered(predictions, chosen, subject_of(setup), notes)


def letters_of(
    args: argparse.Namespace,
    problems: dict[str, Any],
    reasons: dict[str, str],
    setup: TokenSetup,
    devices: list[str],
    stop: threading.Event,
    last: bool,
) -> Any:
    """The second pass: which letter follows from the reasons."""
    processor = processor_of(setup)
    rows = [second_row(pid, problems[pid], text, processor, image_last=last) for pid, text in reasons.items()]
    brief = with_sampling(setup, max_tokens=8, stop=("###", "\n"))
    return answer_rows(rows, args.out / "letters.jsonl", brief, devices, stop, overwrite=args.overwrite)


# ---- the ensembles


def with_teacher(
    args: argparse.Namespace,
    table_of_problems: Mapping[str, Any],
    problems: dict[str, Any],
    answered: Answered,
    asks: bool,
    stop: threading.Event,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of the table and counts: the teacher alone, the complement, and the judge where there is one."""
    theirs = teachers_answers(args, table_of_problems, problems, stop)
    known = {pid: theirs.texts.get(pid, "") for pid in problems} if theirs.texts else {}
    choices: dict[str, int | None] = (
        choose(Predictions(known), problems).answers if theirs.texts else {p: theirs.stored.get(p) for p in problems}
    )
    own = answered.chosen.answers
    rows = {"teacher alone": score(problems, choices)}
    rows["complement"] = score(problems, ensembles.complement(own, choices))
    differ = ensembles.differing(own, choices)
    right = {pid: problem["answer"] for pid, problem in problems.items()}
    counts: dict[str, Any] = {
        "teacher_unparsed": sum(choice is None for choice in choices.values()),
        "differing": len(differ),
        "upper_bound": ensembles.upper_bound(own, choices, right),
    }
    verdicts = judges_answers(args, problems, differ, answered.predictions.texts, known, asks, stop)
    if verdicts is not None:
        final = {pid: choose(Predictions({pid: text}), {pid: problems[pid]}).answers[pid] for pid, text in verdicts}
        counts["judge_asked"] = len(differ)
        counts["judge_unparsed_or_missing"] = sum(final.get(pid) is None for pid in differ)
        rows["teacher as judge"] = score(problems, ensembles.judged(own, choices, final))
    counts |= {name.replace(" ", "_"): row for name, row in rows.items()}
    return rows, counts


def teachers_answers(
    args: argparse.Namespace,
    table_of_problems: Mapping[str, Any],
    problems: dict[str, Any],
    stop: threading.Event,
) -> Predictions:
    if args.teacher_answers:
        return read_predictions(args.teacher_answers)
    shots = [text for pair in examples(table_of_problems, args.shots) for text in pair]
    system = wording("scienceqa_teacher")
    questions = [
        Question(pid, conversation(system, *shots, build_question(problem, "QCM"))) for pid, problem in problems.items()
    ]
    return Predictions(asked(args, questions, "teacher.jsonl", [system, *shots], stop))


def judges_answers(
    args: argparse.Namespace,
    problems: dict[str, Any],
    differ: list[str],
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    asks: bool,
    stop: threading.Event,
) -> list[tuple[str, str]] | None:
    """What the judge said of each problem in ``differ``; None where there is no judge."""
    if args.judge_answers:
        said = read_predictions(args.judge_answers).texts
        return [(pid, said[pid]) for pid in differ if pid in said]
    if not asks:
        return None
    for path, texts in ((args.predictions, ours), (args.teacher_answers, theirs)):
        silent = [pid for pid in differ if pid not in texts]
        if silent:
            raise ConfigError(
                f"{path} has no text for {len(silent)} problems that the judge must read, the first is {silent[0]!r}; "
                f"give a file with texts ('outputs')"
            )
    text = wording("scienceqa_judge", args.judge_prompt, ("question", "first", "second"))
    system = wording("scienceqa_teacher")
    questions = [
        Question(
            pid,
            conversation(
                system,
                fill(text, question=build_question(problems[pid], "QCM"), first=ours[pid], second=theirs[pid]),
            ),
        )
        for pid in differ
    ]
    depends = [system, text, digest_of_texts(ours), digest_of_texts(theirs)]
    return list(asked(args, questions, "judge.jsonl", depends, stop).items())


def asked(
    args: argparse.Namespace,
    questions: list[Question],
    name: str,
    depends: list[str],
    stop: threading.Event,
) -> dict[str, str]:
    """The teacher's answers by id of the problem, through a journal in the folder of the run."""
    same = {
        "texts": digest_of_texts(dict(enumerate_texts(depends))),
        "model": args.teacher_model,
        "problems": digest_of(args.problems),
    }
    teacher = teacher_of(args, "teacher")
    assert teacher is not None
    return {key: row["content"] for key, row in ask_and_keep(args, teacher, questions, name, same, stop).items()}


def enumerate_texts(texts: list[str]) -> list[tuple[str, str]]:
    return [(str(number), text) for number, text in enumerate(texts)]


# ---- what comes out


def report(rows: Mapping[str, Any], answered: Answered, args: argparse.Namespace) -> None:
    print(table(rows, paper=args.split == "test" and args.limit is None and not args.skip_missing))
    average = rows["this run"]["Avg"]
    print(f"\n{average['correct']} of {average['count']} right", end="")
    print(f"; {len(answered.chosen.unparsed)} texts named no choice and count as {args.fallback}")
    again = answered.notes.get("texts_read_again")
    if again:
        print(
            f"these are the choices that the file stores; its texts read again give {again['correct']} "
            f"({again['accuracy']:.2f}), {len(again['unparsed'])} of them name no choice"
        )
    for pid, why in list(answered.notes.get("failed", {}).items())[:5]:
        print(f"problem {pid} has no answer: {why}", file=sys.stderr)


def as_result(
    args: argparse.Namespace,
    problems: dict[str, Any],
    answered: Answered,
    rows: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    answers = answered.chosen.answers
    items = [
        Item(pid, columns_of(problem), float(answers[pid] == problem["answer"]), 1.0)
        for pid, problem in problems.items()
    ]
    return result(
        "scienceqa",
        subject=answered.subject,
        data=[args.problems, args.splits],
        settings={"split": args.split, "limit": args.limit, "fallback": args.fallback, "seed": args.seed},
        items=items,
        command=args.argv,
        metrics={name: one["accuracy"] for name, one in rows["this run"].items() if one["count"]},
        columns=rounded(rows["this run"]),
        **{**more, "ensembles": {k: rounded(v) if isinstance(v, dict) else v for k, v in more["ensembles"].items()}}
        if "ensembles" in more
        else more,
        paper=PAPER,
    )


def rounded(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies to two places, as the paper prints them; correct and count beside are exact."""
    return {
        name: {**one, "accuracy": None if one["accuracy"] is None else round(one["accuracy"], 2)}
        for name, one in columns.items()
    }
