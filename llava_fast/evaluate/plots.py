"""Plots of relative scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_fast.evaluate.relative import Score, spread

_BAR, _POINT, _INK = "#5b7fd6", "#16244d", "#1c2330"
_SIDES = ("#b9c4dd", _BAR, _POINT)


def draw_relative(runs: dict[int, dict[str, Score]], path: Path, title: str) -> None:
    """A bar a category, and on it a point for each run of the judge; 100 is the reference.

    Args:
        runs: as :func:`llava_fast.evaluate.relative.by_run` gives them.
        path: of the PNG file.
        title: above the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    over = {name: one for name, one in spread(runs.values()).items() if one.mean is not None}
    figure, axes = plt.subplots(figsize=(1.6 + 1.25 * len(over), 4.2), dpi=110, layout="constrained")
    heights = [one.mean or 0.0 for one in over.values()]
    axes.bar(range(len(over)), heights, width=0.62, color=_BAR, zorder=2)
    for place, (name, one) in enumerate(over.items()):
        values = [v for scores in runs.values() if name in scores and (v := scores[name].relative) is not None]
        if len(values) > 1:
            axes.plot([place] * len(values), values, "o", color=_POINT, markersize=4, zorder=3)
        text = f"{one.mean:.1f}" + ("" if one.deviation is None else f"\n±{one.deviation:.1f}")
        axes.annotate(
            text,
            (place, max([one.mean or 0.0, *values])),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=10,
            color=_INK,
        )
    _finish(figure, axes, list(over), max(115.0, 1.18 * max(heights, default=0.0)), title, path)


def draw_beside(scores: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path, title: str) -> None:
    """A group of bars a category, one for each model, with the intervals of the bootstrap.

    Args:
        scores: by model, then by category: ``value``, ``low`` and ``high`` in percent of the reference.
        path: of the PNG file.
        title: above the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    figure, axes = plt.subplots(figsize=(2.0 + 1.5 * len(groups), 4.2), dpi=110, layout="constrained")
    for number, ((name, found), color) in enumerate(zip(scores.items(), _SIDES, strict=False)):
        values, lows, highs = ([found[group][side] for group in groups] for side in ("value", "low", "high"))
        places = [place + (number - (len(scores) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(places, values, width=0.92 * width, color=color, label=name, zorder=2)
        spread = [[v - low for v, low in zip(values, lows, strict=True)],
                  [high - v for v, high in zip(values, highs, strict=True)]]  # fmt: skip
        axes.errorbar(places, values, spread, fmt="none", ecolor=_INK, elinewidth=1, capsize=3, zorder=3)
        for place, value, high in zip(places, values, highs, strict=True):
            axes.annotate(
                f"{value:.1f}", (place, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9,
                color=_INK,
            )  # fmt: skip
    tallest = max(one[group]["high"] for one in scores.values() for group in groups)
    _finish(figure, axes, groups, max(115.0, 1.12 * tallest), title, path)


def _finish(figure: Any, axes: Any, groups: Sequence[str], top: float, title: str, path: Path) -> None:
    """What the plots have in common: the line of the reference, the axes, and the file."""
    import matplotlib.pyplot as plt

    axes.axhline(100, color=_INK, linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        "reference",
        (1, 100),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_INK,
    )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, top)
    axes.set_ylabel("relative score, %")
    axes.set_title(title, fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", frameon=False, ncols=2, fontsize=9)
    axes.grid(axis="y", color="#e3e6ec", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    plt.close(figure)
    part.replace(path)
