"""The options that say who teaches or judges, and the teacher that they come to."""

from __future__ import annotations

import argparse
import os

from llava_fast.errors import ConfigError
from llava_fast.teacher import OpenAITeacher


def add_teacher_options(
    parser: argparse.ArgumentParser, role: str, text: str, *, temperature: float
) -> argparse._ArgumentGroup:
    """``--{role}-url`` and what belongs to it."""
    group = parser.add_argument_group(role, text)
    add = group.add_argument
    add(f"--{role}-url", dest="teacher_url", metavar="URL", help="such as https://api.openai.com/v1")
    add(f"--{role}-model", dest="teacher_model", metavar="NAME", help="the model's name there")
    add(
        f"--{role}-key-env",
        dest="teacher_key_env",
        metavar="VARIABLE",
        default="OPENAI_API_KEY",
        help="environment variable that holds the key; the key itself is never written (default %(default)s)",
    )
    add(
        f"--{role}-at-once",
        dest="at_once",
        metavar="N",
        type=int,
        default=8,
        help="questions at a time (default %(default)s)",
    )
    add(f"--{role}-rate", dest="rate", type=float, metavar="N", help="most requests a minute (default no limit)")
    add(
        f"--{role}-timeout",
        dest="timeout",
        metavar="S",
        type=float,
        default=120,
        help="seconds a try (default %(default)s)",
    )
    add(f"--{role}-tries", dest="tries", metavar="N", type=int, default=8, help="of a question (default %(default)s)")
    add(
        f"--{role}-temperature",
        dest="teacher_temperature",
        metavar="T",
        type=float,
        default=temperature,
        help="default %(default)s",
    )
    add(
        f"--{role}-max-tokens",
        dest="teacher_max_tokens",
        metavar="N",
        type=int,
        default=1024,
        help="of its answer (default %(default)s)",
    )
    return group


def teacher_of(args: argparse.Namespace, role: str) -> OpenAITeacher | None:
    """The teacher that the options name, or None where they name none. Good for one event loop.

    Raises:
        ConfigError: an address without a model's name or the other way round; the openai package is missing.
    """
    if not args.teacher_url and not args.teacher_model:
        return None
    if not args.teacher_url or not args.teacher_model:
        raise ConfigError(f"--{role}-url={args.teacher_url} and --{role}-model={args.teacher_model}: give both")
    return OpenAITeacher(
        args.teacher_url,
        args.teacher_model,
        os.environ.get(args.teacher_key_env),
        at_once=args.at_once,
        per_minute=args.rate,
        tries=args.tries,
        timeout=args.timeout,
    )
