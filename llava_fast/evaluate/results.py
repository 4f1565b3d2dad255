"""The one form of all results: what was measured, of what, on what, with what, and by which command.

``items`` are what two results are compared by: an item counts ``value / weight`` towards each of its ``groups``, and a
group's figure is 100 times the sum of values over the sum of weights. For accuracy the weight is 1; for LLaVA-Bench the
weight is the reference answer's score, which makes the figure the ratio of means.
"""

from __future__ import annotations

import platform
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import digest_of, read_object

FORMAT = "llava_fast.evaluate/1"
_PACKAGES = ("llava-fast", "torch", "triton", "openai")


@dataclass(frozen=True)
class Item:
    """Attributes: id: of the question; groups: the figures it counts in; value, weight: see this module's page."""

    id: str
    groups: tuple[str, ...]
    value: float
    weight: float


def result(
    benchmark: str,
    *,
    subject: Mapping[str, Any],
    data: Iterable[Path],
    settings: Mapping[str, Any],
    items: Iterable[Item],
    command: Iterable[str],
    metrics: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A result, ready to be written as JSON.

    Args:
        benchmark: its name.
        subject: what was measured: the model and its digest, or the file of answers and its digest.
        data: the files that it was measured on; their digests are taken.
        settings: what the figures depend on.
        items: one a question.
        command: the arguments of ``python -m llava_fast.evaluate``.
        metrics: the figures, in percent; None: those that the items add up to.
        **more: what only this benchmark has.
    """
    kept = list(items)
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "metrics": {
            group: round(figure, 4) for group, figure in (figures(kept) if metrics is None else metrics).items()
        },
        **more,
        "subject": dict(subject),
        "settings": dict(settings),
        "data": [{"path": str(path), "blake2b": digest_of(path)} for path in data],
        "versions": versions(),
        "command": shlex.join(["python", "-m", "llava_fast.evaluate", *command]),
        "items": [asdict(item) for item in kept],
    }


def figures(items: Iterable[Item]) -> dict[str, float]:
    """Each group's figure, in percent; groups without weight have none."""
    values: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for item in items:
        for group in item.groups:
            values[group] += item.value
            weights[group] += item.weight
    return {group: 100 * values[group] / weight for group, weight in weights.items() if weight}


def read_result(path: Path) -> dict[str, Any]:
    """A result that ``--json`` wrote, its items as :class:`Item`.

    Raises:
        ConfigError: it is none.
    """
    whole = read_object(path)
    if whole.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {whole.get('format')!r}; give a file that --json wrote, of {FORMAT!r}")
    items = [Item(i["id"], tuple(i["groups"]), i["value"], i["weight"]) for i in whole["items"]]
    return {**whole, "items": items}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
