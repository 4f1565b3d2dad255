"""python -m llava_fast.evaluate pope: does the model see objects that are not there? Yes or no, over COCO pictures.

POPE (Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023) asks about objects that
are absent in three ways, each a file: random, popular, adversarial. Reading of answers and figures follow the script
that the LLaVA authors score it with, ``llava/eval/eval_pope.py``.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.evaluate.answering import add_model_options, answer_rows, setup_from, subject_of
from llava_fast.evaluate.files import Row, check_writable, digest_of, read_rows, write_object, write_whole
from llava_fast.evaluate.relative import layout
from llava_fast.evaluate.results import Item, result

BRIEF = "Answer the question using a single word or phrase."  # in LLaVA-1.5's training data, for short answers

EPILOG = """\
examples:
  python -m llava_fast.evaluate pope --questions coco_pope_random.json coco_pope_popular.json \\
      coco_pope_adversarial.json --images val2014 --model llava-v1.5-7b --out runs/pope --json pope.json
  python -m llava_fast.evaluate pope --questions coco_pope_random.json --answers answers.jsonl

questions: JSONL of {"question_id", "image", "text", "label": "yes" | "no"}, a file for each way of choosing objects
answers: JSONL of {"question_id", "text"}; with several files of questions ids are "FILE/ID", as --out writes them
An answer is a no where its first sentence holds the word no, No or not, else a yes.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "pope",
        help="yes-or-no questions about objects that may not be there",
        description="POPE: accuracy, precision, recall, F1 and the share of yes, for each file of questions.",
        usage="python -m llava_fast.evaluate pope --questions FILE... [--model DIR | --answers FILE] [options]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--questions", type=Path, nargs="+", required=True, help="files of questions with labels")
    parser.add_argument("--answers", type=Path, help="file of answers, instead of --model")
    parser.add_argument("--brief", default=BRIEF, help="line after each question; empty for none (default %(default)r)")
    add_model_options(parser, max_tokens=16)
    parser.add_argument("--seed", type=int, default=0, help="of the model's draws (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/pope"), help="folder of the run (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="delete what --out holds of earlier answers")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the scores there")


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    if (args.model is None) == (args.answers is None):
        raise ConfigError(f"--model {args.model} and --answers {args.answers}: give one of the two")
    if args.json:
        check_writable(args.json, "--json")
    files = {path.stem: read_rows(path, ("question_id", "image", "text", "label")) for path in args.questions}
    questions = {f"{name}/{row['question_id']}": row for name, rows in files.items() for row in rows}
    texts, subject = answers_of(args, questions, stop)
    scores = {
        name: score([(is_yes(row["label"]), is_yes(texts[f"{name}/{row['question_id']}"])) for row in rows])
        for name, rows in files.items()
    }
    average = mean(one["f1"] for one in scores.values())
    print(layout(list(FIGURES), {name: [f"{one[f]:.2f}" for f in FIGURES] for name, one in scores.items()}))
    print(f"\nmean F1 {average:.2f}")
    if args.json:
        items = [
            Item(key, (key.rpartition("/")[0], "all"), float(is_yes(texts[key]) == is_yes(row["label"])), 1.0)
            for key, row in questions.items()
        ]
        whole = result(
            "pope",
            subject=subject,
            data=args.questions,
            settings={"brief": args.brief},
            items=items,
            command=args.argv,
            scores=scores,
            mean_f1=average,
        )
        write_object(args.json, whole)
    return 0


FIGURES = ("accuracy", "precision", "recall", "f1", "yes")


def is_yes(text: str) -> bool:
    """Whether an answer, or a label, says yes: the authors' rule, which takes all for yes that is no clear no."""
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return not ({"no", "No", "not"} & set(words))


def score(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Figures in percent, of (label, answer), with yes as the positive.

    Raises:
        ConfigError: there are no questions.
    """
    if not pairs:
        raise ConfigError("a file of questions is empty; give one that holds some")
    hits = sum(label and said for label, said in pairs)
    said_yes, are_yes = sum(said for _, said in pairs), sum(label for label, _ in pairs)
    precision, recall = hits / said_yes if said_yes else 0.0, hits / are_yes if are_yes else 0.0
    figures = {
        "accuracy": sum(label == said for label, said in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes": said_yes / len(pairs),
    }
    return {name: 100 * value for name, value in figures.items()}


def answers_of(
    args: argparse.Namespace, questions: Mapping[str, Row], stop: threading.Event
) -> tuple[dict[str, str], dict[str, Any]]:
    """Answers by "FILE/ID", and what they are of."""
    if args.answers:
        texts = {str(row["question_id"]): str(row["text"]) for row in read_rows(args.answers, ("question_id", "text"))}
        if len(args.questions) == 1:
            texts = {f"{args.questions[0].stem}/{number.rpartition('/')[2]}": text for number, text in texts.items()}
        missing = [key for key in questions if key not in texts]
        if missing:
            raise ConfigError(
                f"{args.answers} lacks {len(missing)} of {len(questions)} answers, the first is {missing[0]!r}; with "
                f"several files of questions its ids must be FILE/ID"
            )
        return texts, {"answers": str(args.answers), "blake2b": digest_of(args.answers)}
    absent = [row["image"] for row in questions.values() if not ((args.images or Path()) / row["image"]).is_file()]
    if absent:
        raise ConfigError(f"{len(absent)} pictures are not under --images {args.images}, the first is {absent[0]}")
    setup, devices = setup_from(args)
    end = "\n" + args.brief if args.brief else ""
    rows: list[Row] = [{"id": k, "image": row["image"], "prompt": row["text"] + end} for k, row in questions.items()]
    found = answer_rows(rows, args.out / "engine.jsonl", setup, devices, stop, overwrite=args.overwrite)
    for key, why in found.failures.items():
        raise ConfigError(f"{len(found.failures)} questions have no answer, the first is {key}: {why}")
    lines = (json.dumps({"question_id": key, "text": found.texts[key]}, ensure_ascii=False) + "\n" for key in questions)
    write_whole(args.out / "answers.jsonl", "".join(lines))
    return found.texts, subject_of(setup)
