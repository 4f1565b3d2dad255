"""Plots of relative scores."""

from __future__ import annotations

from pathlib import Path

from llava_fast.evaluate.relative import Score, spread

_BAR, _POINT, _INK = "#5b7fd6", "#16244d", "#1c2330"


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
    axes.set_xticks(range(len(over)), list(over))
    axes.set_ylim(0, max(115.0, 1.18 * max(heights, default=0.0)))
    axes.set_ylabel("relative score, %")
    axes.set_title(title, fontsize=11)
    axes.grid(axis="y", color="#e3e6ec", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    plt.close(figure)
    part.replace(path)
