"""python -m llava_fast.evaluate llava-bench: answers to open questions about pictures, scored by a judge."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.evaluate import relative
from llava_fast.evaluate.answering import add_model_options, answer_rows, digest_of_texts, setup_from, subject_of
from llava_fast.evaluate.asking import ask_and_keep
from llava_fast.evaluate.bench import FILES, SETS, Item, read_bench, scenes_bench
from llava_fast.evaluate.files import Row, check_writable, digest_of, read_rows, write_object, write_whole
from llava_fast.evaluate.judge import RuleJudge, judge_questions, judge_texts
from llava_fast.evaluate.page import Answerer, write_page
from llava_fast.evaluate.plots import draw_relative
from llava_fast.evaluate.results import Item as ResultItem
from llava_fast.evaluate.results import result
from llava_fast.evaluate.reviews import UNPARSABLE, Review, read_reviews, review_of
from llava_fast.evaluate.teacher_options import add_teacher_options, teacher_of
from llava_fast.teacher import Teacher

RULE = "rule"

EPILOG = """\
examples:
  python -m llava_fast.evaluate llava-bench --reviews review1.jsonl review2.jsonl
      scores reviews that exist already, ours or the authors'; each file counts as a run of the judge
  python -m llava_fast.evaluate llava-bench --set wild --bench llava-bench-in-the-wild --model llava-v1.5-13b \\
      --judge-url https://api.openai.com/v1 --judge-model gpt-4-0613 --runs 3 --out runs/wild --json wild.json
      answers the 60 questions, has them judged three times, writes table, JSON, plot and page
  python -m llava_fast.evaluate llava-bench --set scenes --model runs/demo/stage2/model --out runs/scenes
      built-in pictures and a judge by rule: nothing to download and nobody to pay. Its figures are no LLaVA-Bench

--bench is a folder with the authors' files:
  coco   qa90_questions.jsonl, qa90_gpt4_answer.jsonl, caps_boxes_coco2014_val_80.jsonl; images: COCO's val2014
  wild   questions.jsonl, answers_gpt4.jsonl, context.jsonl, images/ (liuhaotian/llava-bench-in-the-wild on the hub)
--out holds answers.jsonl, reviews.jsonl, result.json, scores.png and page.html; the same command again goes on where it
stopped, and what was judged is not judged again.

The judge's prompt is this package's own, and judges differ: compare only figures of the same judge and prompt.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "llava-bench",
        help="answers scored by a judge against reference answers",
        description="LLaVA-Bench (COCO), LLaVA-Bench (In-the-Wild), or the built-in scenes: relative scores of a "
        "model's answers, from a judge that reads a reference answer beside them.",
        usage="python -m llava_fast.evaluate llava-bench [options]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    data = parser.add_argument_group("questions")
    data.add_argument("--set", choices=SETS, default="coco", help="default %(default)s")
    data.add_argument("--bench", type=Path, metavar="DIR", help="folder with the set's files")
    data.add_argument("--questions", type=Path, metavar="FILE", help="this file instead of the folder's")
    data.add_argument("--references", type=Path, metavar="FILE", help="the same for the reference answers")
    data.add_argument(
        "--contexts", type=Path, metavar="FILE", help="the same for what the judge is told about the pictures"
    )
    data.add_argument(
        "--count", type=int, metavar="N", default=90, help="questions of the built-in scenes (default %(default)s)"
    )
    ready = parser.add_argument_group("what exists already")
    ready.add_argument("--answers", type=Path, metavar="FILE", help="JSONL of question_id and text, instead of --model")
    ready.add_argument(
        "--reviews", type=Path, nargs="+", metavar="FILE", help="score these review files and nothing else"
    )
    add_model_options(parser, max_tokens=1024)
    parser.add_argument("--seed", type=int, default=0, help="of the model's draws (default %(default)s)")
    parser.add_argument("--name", default="candidate", help="what the page calls the model (default %(default)s)")
    parser.add_argument(
        "--beside",
        nargs="+",
        metavar="NAME=FOLDER",
        default=[],
        help="show the answers and scores of earlier runs of this set (their --out) beside these on the page",
    )
    judge = add_teacher_options(
        parser, "judge", "a language model behind an OpenAI-compatible address; scenes have a rule", temperature=0.2
    )
    judge.add_argument(
        "--runs", type=int, metavar="N", default=1, help="times that everything is judged (default %(default)s)"
    )
    judge.add_argument("--both-orders", action="store_true", help="judge with the candidate first too: position bias")
    judge.add_argument("--judge-prompt", type=Path, help="own text, with {context}, {question}, {first} and {second}")
    judge.add_argument("--judge-system", type=Path, help="own system text")
    judge.add_argument(
        "--unparsable",
        choices=UNPARSABLE,
        default=UNPARSABLE[0],
        help="reviews without two scores in their first line: left out, or -1 for both answers as the authors' script "
        "has it (default %(default)s)",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, help="folder of the run (default runs/llava-bench-SET)")
    out.add_argument("--overwrite", action="store_true", help="delete what --out holds of earlier answers and reviews")
    out.add_argument("--json", type=Path, metavar="PATH", help="write the scores there too")
    out.add_argument("--answers-only", action="store_true", help="answer, and judge another day")
    out.add_argument("--dry-run", action="store_true", help="print the judge's first prompt; ask nobody")


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    if args.json:
        check_writable(args.json, "--json")
    if args.reviews:
        return score_files(args)
    check_source(args)
    args.out = args.out or Path("runs") / f"llava-bench-{args.set}"
    texts = judge_texts(args.set, args.judge_prompt, args.judge_system)
    items, files = bench_of(args)
    beside = beside_of(args)
    answers, subject = answers_of(args, items, stop)
    if args.answers_only:
        print(f"{len(answers)} answers in {args.out / 'answers.jsonl'}; the same command without --answers-only judges")
        return 0
    if args.dry_run:
        for message in judge_questions(items, answers, texts, runs=1, both_orders=False)[0].messages:
            print(f"[{message['role']}]\n{message['content']}\n")
        return 0
    reviews = reviews_of(args, items, answers, texts, stop)
    finish(args, items, files, beside, answers, subject, texts, reviews)
    return 0


def check_source(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: no answers, or nobody to judge them; told before any work is done.
    """
    if (args.model is None) == (args.answers is None):
        raise ConfigError(f"--model {args.model} and --answers {args.answers}: give one of the two, or --reviews alone")
    asks = teacher_of(args, "judge") is not None
    if not asks and args.set != "scenes" and not args.answers_only and not args.dry_run:
        raise ConfigError(
            "nobody judges: give --judge-url and --judge-model, or --answers-only to judge another day; the built-in "
            "judge by rule knows --set scenes alone"
        )
    if args.runs < 1:
        raise ConfigError(f"--runs {args.runs} must be 1 or more")


# ---- the stages


def bench_of(args: argparse.Namespace) -> tuple[list[Item], list[Path]]:
    """The questions, and the files that they come from. Sets ``args.images`` where the set has a place for them."""
    if args.set == "scenes":
        args.images = args.out / "images"
        return scenes_bench(args.count, args.images), []
    own = (args.questions, args.references, args.contexts)
    names = FILES[args.set]
    if args.bench is None and None in own:
        raise ConfigError(
            f"--set {args.set} needs --bench DIR with {', '.join(names)}; see --help for where it is from"
        )
    paths = [given or args.bench / name for given, name in zip(own, names, strict=True)]
    if args.images is None and args.bench is not None and (args.bench / "images").is_dir():
        args.images = args.bench / "images"
    return [replace(item, image=image_name(args.images, item.image)) for item in read_bench(*paths)], paths


def beside_of(args: argparse.Namespace) -> dict[str, Answerer]:
    """``--beside``: what earlier runs left in their folders.

    Raises:
        ConfigError: an entry that is no NAME=FOLDER, or a folder without answers.
    """
    found = {}
    for entry in args.beside:
        name, sign, folder = entry.partition("=")
        if not (name and sign and folder) or name in (args.name, *found):
            raise ConfigError(f"--beside {entry}: give NAME=FOLDER, each with a name of its own")
        rows = read_rows(Path(folder) / "answers.jsonl", ("question_id", "text"))
        reviews = Path(folder) / "reviews.jsonl"
        found[name] = Answerer(
            {str(row["question_id"]): str(row["text"]) for row in rows},
            read_reviews([reviews]) if reviews.is_file() else [],
        )
    return found


def image_name(folder: Path | None, name: str) -> str:
    """The picture's name in the folder, which for COCO's own files begins with the name of the split."""
    longer = f"COCO_val2014_{name}"
    return longer if folder is not None and not (folder / name).is_file() and (folder / longer).is_file() else name


def answers_of(
    args: argparse.Namespace, items: Sequence[Item], stop: threading.Event
) -> tuple[dict[str, str], dict[str, Any]]:
    """Answers by question, and what they are of."""
    if args.answers:
        texts = {str(row["question_id"]): str(row["text"]) for row in read_rows(args.answers, ("question_id", "text"))}
        missing = [item.id for item in items if item.id not in texts]
        if missing:
            raise ConfigError(f"{args.answers} lacks {len(missing)} of {len(items)} answers, the first is {missing[0]}")
        write_answers(args.out / "answers.jsonl", items, texts)
        return texts, {"answers": str(args.answers), "blake2b": digest_of(args.answers)}
    check_images(args, items)
    setup, devices = setup_from(args)
    rows: list[Row] = [{"id": item.id, "image": item.image, "prompt": item.question} for item in items]
    found = answer_rows(rows, args.out / "engine.jsonl", setup, devices, stop, overwrite=args.overwrite)
    for number, why in found.failures.items():
        raise ConfigError(f"{len(found.failures)} questions have no answer, the first is {number}: {why}")
    write_answers(args.out / "answers.jsonl", items, found.texts)
    return found.texts, subject_of(setup)


def write_answers(path: Path, items: Sequence[Item], texts: Mapping[str, str]) -> None:
    lines = ({"question_id": item.id, "prompt": item.question, "text": texts[item.id]} for item in items)
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def check_images(args: argparse.Namespace, items: Sequence[Item]) -> None:
    absent = [item.image for item in items if not ((args.images or Path()) / item.image).is_file()]
    if absent:
        raise ConfigError(
            f"{len(absent)} of {len(items)} questions have no picture under --images {args.images}, the first is "
            f"{absent[0]}; give the folder that holds them"
        )


def reviews_of(
    args: argparse.Namespace,
    items: Sequence[Item],
    answers: Mapping[str, str],
    texts: tuple[str, str],
    stop: threading.Event,
) -> list[Review]:
    """What the judge says of every answer, through the journal."""
    teacher: Teacher = teacher_of(args, "judge") or RuleJudge(items, answers, texts)
    questions = judge_questions(items, answers, texts, runs=args.runs, both_orders=args.both_orders)
    one_run = judge_questions(items, answers, texts, runs=1, both_orders=False)  # more runs may be added later
    same = {
        "judge": args.teacher_model or RULE,
        "asked": digest_of_texts({question.key: repr(question.messages) for question in one_run}),
    }
    rows = ask_and_keep(args, teacher, questions, "reviews.jsonl", same, stop)
    return [review_of(rows[question.key]) for question in questions]


# ---- what comes out


def score_files(args: argparse.Namespace) -> int:
    """``--reviews``: scores, and nothing else."""
    reviews = read_reviews(args.reviews)
    if args.json:
        subject = {"reviews": [str(path) for path in args.reviews]}
        write_object(args.json, as_result(args, reviews, subject, list(args.reviews), {}))
    report(args, reviews, paper=None)
    return 0


def finish(
    args: argparse.Namespace,
    items: Sequence[Item],
    files: list[Path],
    beside: Mapping[str, Answerer],
    answers: Mapping[str, str],
    subject: dict[str, Any],
    texts: tuple[str, str],
    reviews: list[Review],
) -> None:
    settings = {
        "judge": args.teacher_model or RULE,
        "judge_temperature": args.teacher_temperature,
        "judge_prompt": digest_of_texts(dict(zip(("system", "prompt"), texts, strict=True))),
        "runs": args.runs,
        "both_orders": args.both_orders,
    }
    whole = as_result(args, reviews, subject, files, settings)
    for path in filter(None, (args.out / "result.json", args.json)):
        write_object(path, whole)
    runs = relative.by_run(reviews, unparsable=args.unparsable)
    draw_relative(runs, args.out / "scores.png", f"LLaVA-Bench ({args.set}), judged by {settings['judge']}")
    shown = {**beside, args.name: Answerer(answers, reviews)}
    write_page(args.out / "page.html", items, shown, args.images, whole, args.unparsable)
    report(args, reviews, paper=args.set)
    print(f"\n{args.out / 'page.html'}: every answer beside its reference and what the judge said")


def report(args: argparse.Namespace, reviews: Sequence[Review], paper: str | None) -> None:
    print(relative.table(relative.by_run(reviews, unparsable=args.unparsable), paper))
    lost = [review for review in reviews if review.scores is None]
    if lost:
        fate = "left out" if args.unparsable == UNPARSABLE[0] else "counted as -1 for both answers"
        numbers = ", ".join(dict.fromkeys(review.question_id for review in lost))
        print(
            f"\n{len(lost)} of {len(reviews)} reviews hold no two scores, {fate}: questions {numbers}", file=sys.stderr
        )
    bias = relative.position_bias(reviews)
    if bias is not None:
        shown = [f"{value:.1f}" if value is not None else "-" for value in bias.relative]
        print(
            f"\nposition: {shown[0]} with the reference first, {shown[1]} with the candidate first; standing first is "
            f"worth {bias.first_gain:+.2f} points, and decided {bias.turned} of {bias.pairs} comparisons"
        )


def as_result(
    args: argparse.Namespace,
    reviews: Sequence[Review],
    subject: dict[str, Any],
    files: list[Path],
    settings: dict[str, Any],
) -> dict[str, Any]:
    runs = relative.by_run(reviews, unparsable=args.unparsable)
    over = relative.spread(runs.values())
    bias = relative.position_bias(reviews)
    return result(
        "llava-bench" if args.reviews else f"llava-bench-{args.set}",
        metrics={name: one.mean for name, one in over.items() if one.mean is not None},
        subject=subject,
        data=files,
        settings={**settings, "unparsable": args.unparsable},
        items=result_items(reviews),
        command=args.argv,
        scores=relative.as_json(runs),
        unparsable=[{"question_id": r.question_id, "run": r.run, "order": r.order} for r in reviews if not r.scores],
        position_bias=None if bias is None else vars(bias),
    )


def result_items(reviews: Sequence[Review]) -> list[ResultItem]:
    """One a question: the means of its scores over runs and orders."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for review in reviews:
        if review.scores is not None:
            found.setdefault((review.question_id, review.category), []).append(review.scores)
    return [
        ResultItem(
            number,
            (*filter(None, [category]), relative.ALL),
            mean(pair[1] for pair in pairs),
            mean(pair[0] for pair in pairs),
        )
        for (number, category), pairs in found.items()
    ]
