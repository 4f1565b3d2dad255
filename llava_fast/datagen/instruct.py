"""Make instruction data: pictures in words, a teacher's answers, checked samples."""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections import Counter
from typing import Any

from tqdm import tqdm

from llava_fast.data.scenes import DETAIL_REQUESTS
from llava_fast.datagen.asking import How, Recall, ask_all
from llava_fast.datagen.built_in import draw_scenes
from llava_fast.datagen.checks import Verdict
from llava_fast.datagen.options import build_parser, check_teacher, counts_of, key_of, read_sources
from llava_fast.datagen.output import tell, write_results
from llava_fast.datagen.pictures import as_row
from llava_fast.datagen.plan import Plan, Task, estimate, make_plan
from llava_fast.datagen.prompting import Prompts, read_prompts
from llava_fast.datagen.rule_teacher import RuleTeacher
from llava_fast.datagen.samples import LinesFile, write_json
from llava_fast.datagen.statistics import write_page
from llava_fast.errors import ConfigError
from llava_fast.interrupt import interrupts
from llava_fast.teacher import Message, OpenAITeacher, Reply, ReplyFile, TeacherUnusableError, Usage

UNANSWERED, INTERRUPTED = 1, 130


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.dry_run is None:
        check_teacher(args)
    prompts = prompts_of(args)
    plan = make_plan(read_sources(args), args.kinds, counts=counts_of(args), in_turn=args.in_turn, seed=args.seed)
    if not len(plan):
        raise ConfigError("there is nothing to do: no pictures; check the source, --limit and --count")
    if args.dry_run is not None:
        print_prompts(plan, prompts, args.dry_run)
        print(estimate(plan.tasks, prompts).tell(tuple(args.price)))
        return 0
    if args.scenes:
        write_scenes(args, plan)
    if args.rules:
        return finish(args, plan, prompts, lambda messages, draw: RuleTeacher().answer(messages, draw), None, [])
    return with_model(args, plan, prompts)


def prompts_of(args: argparse.Namespace) -> Prompts:
    prompts = read_prompts(args.prompts, args.questions)
    if args.scenes and not args.questions:  # the built-in model knows the words of the built-in set
        return Prompts(prompts.system, prompts.shots, DETAIL_REQUESTS)
    return prompts


def print_prompts(plan: Plan, prompts: Prompts, pictures: int) -> None:
    """The exact messages of every task of the first pictures."""
    first = list(dict.fromkeys(task.picture.id for task in plan))[:pictures]
    for task in plan:
        if task.picture.id in first:
            print(f"######## {task.kind.name} of {task.picture.id} ({task.picture.image})")
            for message in prompts.messages(task.kind, task.picture):
                print(f"---- {message['role']}\n{message['content']}")
    print("########")


def write_scenes(args: argparse.Namespace, plan: Plan) -> None:
    """The scenes as images, and as pictures.jsonl, which other commands read."""
    with tqdm(total=args.scenes, desc="draw", unit="scene", dynamic_ncols=True) as bar:
        draw_scenes(args.out, args.scenes, args.scene_seed, bar.update)
    pictures = {task.picture.id: task.picture for task in plan}
    with LinesFile(args.out / "pictures.jsonl") as file:
        for picture in pictures.values():
            file.add(as_row(picture))


def with_model(args: argparse.Namespace, plan: Plan, prompts: Prompts) -> int:
    """Ask a served model what has not been answered, then write what there is."""
    how = How(args.max_tokens, args.temperature, args.draws, args.at_once)
    replies = ReplyFile(args.out / "replies.jsonl")
    try:
        teacher = OpenAITeacher(
            args.teacher_url,
            args.teacher_model,
            key_of(args),
            replies=replies,
            at_once=args.at_once,
            per_minute=args.per_minute,
            tries=args.tries,
            timeout=args.timeout,
            pause=args.pause,
            price=tuple(args.price),
        )

        def recall(messages: list[Message], draw: int) -> Reply | None:
            key = teacher.key(messages, max_tokens=how.max_tokens, temperature=how.temperature, draw=draw)
            known = replies.get(key)
            return None if known is None else Reply(known["text"], known["finish_reason"])

        left = [task for task in plan if recall(prompts.messages(task.kind, task.picture), 0) is None]
        say(f"to ask: {estimate(left, prompts).tell(tuple(args.price))}; {len(plan) - len(left):,} have been answered")
        asked_to_stop = threading.Event()
        with interrupts(asked_to_stop):  # what is on its way has been paid for: it may still arrive
            faults = asyncio.run(ask(args, plan, prompts, teacher, how, asked_to_stop))
        code = finish(args, plan, prompts, recall, teacher.usage, faults)
        return INTERRUPTED if asked_to_stop.is_set() and not is_spent(args, teacher.usage) else code
    finally:
        replies.close()


async def ask(
    args: argparse.Namespace, plan: Plan, prompts: Prompts, teacher: OpenAITeacher, how: How, stop: threading.Event
) -> list[str]:
    """Ask everything; returns what went wrong, a line each."""
    rejected: Counter[str] = Counter()
    with tqdm(total=len(plan), desc="ask", unit="task", dynamic_ncols=True) as bar:

        def done(task: Task, verdicts: list[Verdict]) -> None:
            rejected.update(fault.reason for verdict in verdicts for fault in verdict.faults)
            bar.set_postfix_str(running_total(teacher.usage, rejected), refresh=False)
            bar.update()
            if is_spent(args, teacher.usage):
                stop.set()

        async with teacher:
            try:
                failures = await ask_all(plan, prompts, teacher, how, done=done, stop=stop)
            except (TeacherUnusableError, OSError) as error:  # what was answered until then is written
                return [str(error)]
    faults = [f"{failure.task.kind.name} of {failure.task.picture.id}: {failure.why}" for failure in failures]
    if is_spent(args, teacher.usage):
        faults.append(f"--budget {args.budget} is spent; the same command with another one goes on")
    return faults


def is_spent(args: argparse.Namespace, usage: Usage) -> bool:
    return bool(args.budget) and usage.dollars >= args.budget


def running_total(usage: Usage, rejected: Counter[str]) -> str:
    parts = [f"{usage.prompt_tokens + usage.answer_tokens:,} tokens"]
    if any(usage.price):
        parts.append(f"${usage.dollars:,.2f}")
    if rejected:
        parts.append(f"{rejected.total():,} rejected")
    if usage.retries:
        parts.append(f"{usage.retries:,} retries")
    return ", ".join(parts)


def finish(
    args: argparse.Namespace, plan: Plan, prompts: Prompts, recall: Recall, usage: Usage | None, faults: list[str]
) -> int:
    """Write and tell what the answers come to."""
    with tqdm(total=len(plan), desc="write", unit="task", dynamic_ncols=True) as bar:
        results = write_results(
            args.out, plan, prompts, recall, kinds=args.kinds, draws=args.draws, seed=args.seed, each=bar.update
        )
    write_json(args.out / "summary.json", {"tasks": len(plan), **results.summary(), "this_run": told(usage, faults)})
    if results.samples.total():
        write_page(args.out / "statistics.html", [args.out / "instruct.json"], results.summary())
    for fault in faults[:10]:
        say(f"error: {fault}")
    if len(faults) > 10:
        say(f"... and {len(faults) - 10:,} more; summary.json has them all")
    print(tell(results, args.out))
    if usage:
        print(f"this run: {usage.replies:,} answers, {running_total(usage, Counter())}")
    missing = results.unanswered.total()
    if missing:
        print(f"{missing:,} tasks have no answer: start the same command again to go on")
    return UNANSWERED if missing else 0


def told(usage: Usage | None, faults: list[str]) -> dict[str, Any]:
    """What this run took, as JSON."""
    if usage is None:
        return {"teacher": "rules", "faults": faults}
    return {
        "answers": usage.replies,
        "from_file": usage.from_file,
        "retries": usage.retries,
        "prompt_tokens": usage.prompt_tokens,
        "answer_tokens": usage.answer_tokens,
        "dollars": usage.dollars,
        "faults": faults,
    }


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
