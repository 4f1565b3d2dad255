"""python -m llava_fast.evaluate compare A B: two results side by side, with confidence intervals from the bootstrap."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import check_writable, write_object
from llava_fast.evaluate.relative import layout
from llava_fast.evaluate.results import Item, read_result

EPILOG = """\
Both must be of one benchmark. Questions are drawn again with replacement, the same ones for A and B, as often as
--draws says; an interval holds the middle 95% of what comes out. Only questions that both have answered count.
A difference whose interval does not hold 0 is marked with *. It tells of the choice of questions, not of the judge's
moods: for those judge several times (llava-bench --runs).
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="two results side by side, with confidence intervals",
        description="Compare two results that --json wrote, question by question.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("a", type=Path, metavar="A", help="a file that --json wrote")
    parser.add_argument("b", type=Path, metavar="B", help="another of the same benchmark")
    parser.add_argument("--draws", type=int, default=4000, help="of the bootstrap (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the comparison there")


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    if args.json:
        check_writable(args.json, "--json")
    if args.draws < 100:
        raise ConfigError(f"--draws {args.draws} is too few for an interval; give 100 or more")
    first, second = read_result(args.a), read_result(args.b)
    if first["benchmark"] != second["benchmark"]:
        raise ConfigError(
            f"{args.a} is of {first['benchmark']!r} and {args.b} of {second['benchmark']!r}; compare like"
        )
    pairs = pair(first["items"], second["items"])
    if not pairs:
        raise ConfigError(f"{args.a} and {args.b} have no question in common")
    order = {name: place for place, name in enumerate(first["metrics"])}
    found = compare(pairs, draws=args.draws, seed=args.seed)
    print(f"A: {args.a}\nB: {args.b}\n{len(pairs)} questions that both have answered\n")
    rows = {
        group: [str(one["questions"]), shown(one["a"]), shown(one["b"]), shown(one["difference"], sign=True)]
        for group, one in sorted(found.items(), key=lambda named: order.get(named[0], len(order)))
    }
    print(layout(("questions", "A", "B", "B - A"), rows))
    if args.json:
        write_object(args.json, {"a": str(args.a), "b": str(args.b), "questions": len(pairs), "groups": found})
    return 0


def pair(first: Sequence[Item], second: Sequence[Item]) -> list[tuple[Item, Item]]:
    """The items of both that are of one question."""
    others = {item.id: item for item in second}
    return [(item, others[item.id]) for item in first if item.id in others]


def compare(pairs: Sequence[tuple[Item, Item]], *, draws: int, seed: int) -> dict[str, dict[str, Any]]:
    """By group: figures of both and their difference, each ``{"value", "low", "high"}`` in percent.

    Args:
        pairs: items of one question.
        draws: bootstrap samples.
        seed: of them.
    """
    groups = list(dict.fromkeys(group for one, _ in pairs for group in one.groups))
    table = np.array([(a.value, a.weight, b.value, b.weight) for a, b in pairs])  # (questions, 4)
    inside = np.array([[group in a.groups for group in groups] for a, _ in pairs], dtype=float)  # (questions, groups)
    parts = np.einsum("qg,qc->qgc", inside, table)  # what a question adds to the sums of a group
    a, b = _figures(parts.sum(0))
    drawn_a, drawn_b = _figures(_bootstrap(parts, draws, np.random.default_rng(seed)))
    return {
        group: {
            "questions": int(inside[:, n].sum()),
            "a": _interval(a[n], drawn_a[:, n]),
            "b": _interval(b[n], drawn_b[:, n]),
            "difference": _interval(b[n] - a[n], drawn_b[:, n] - drawn_a[:, n]),
        }
        for n, group in enumerate(groups)
    }


def _bootstrap(parts: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, groups, 4) sums. A sample is how often each question is drawn: a multinomial count."""
    count, groups, _ = parts.shape
    sums = np.empty((draws, groups * 4))
    for start in range(0, draws, 256):
        end = min(draws, start + 256)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=end - start)
        sums[start:end] = drawn @ parts.reshape(count, -1)
    return sums.reshape(draws, groups, 4)


def _figures(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * sums[..., 0] / sums[..., 1], 100 * sums[..., 2] / sums[..., 3]


def _interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return {"value": float(value), "low": float(low), "high": float(high)}


def shown(one: dict[str, float], *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    sure = "*" if sign and not one["low"] <= 0 <= one["high"] else ""
    return f"{one['value']:{form}}{sure} [{one['low']:{form}}, {one['high']:{form}}]"
