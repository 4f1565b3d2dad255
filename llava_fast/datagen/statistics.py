"""Statistics: a page about data files, with counts, lengths and what the instructions ask for."""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.data.samples import load_samples
from llava_fast.datagen.checks import REASONS
from llava_fast.datagen.instructions import Pairs, openings, parser, verb_nouns
from llava_fast.processor.conversation import IMAGE_MARK

COLORS = ("#2f6f9f", "#d9822b", "#4c9a5f", "#8a5fa8", "#b5473c", "#7a7a7a")
MOST_QUESTIONS = 20_000  # of a kind, that are parsed: enough for shares, and minutes for a large set


class Kinds:
    """What is gathered of each kind: rows, questions, lengths in words."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self.image_first: Counter[str] = Counter()
        self.images: dict[str, set[str]] = defaultdict(set)
        self.questions: dict[str, list[str]] = defaultdict(list)
        self.question_words: dict[str, list[int]] = defaultdict(list)
        self.answer_words: dict[str, list[int]] = defaultdict(list)

    def add(self, kind: str, sample: dict[str, Any]) -> None:
        turns = sample["conversations"]
        self.samples[kind] += 1
        self.image_first[kind] += turns[0]["value"].startswith(IMAGE_MARK)
        self.images[kind].add(str(sample.get("image", "")))
        for turn in turns:
            text = turn["value"].replace(IMAGE_MARK, "").strip()
            if turn["from"] == "human":
                self.questions[kind].append(text)
                self.question_words[kind].append(len(text.split()))
            else:
                self.answer_words[kind].append(len(text.split()))

    def table(self) -> list[list[str]]:
        rows = [
            [
                "",
                "samples",
                "pictures",
                "questions",
                "different",
                "words asked",
                "words answered",
                "95% below",
                "picture first",
            ]
        ]
        for kind, count in self.samples.items():
            asked, answered = np.array(self.question_words[kind]), np.array(self.answer_words[kind])
            rows.append(
                [
                    kind,
                    f"{count:,}",
                    f"{len(self.images[kind] - {''}):,}",
                    f"{len(asked):,}",
                    f"{len(set(self.questions[kind])):,}",
                    f"{asked.mean():.1f}" if len(asked) else "-",
                    f"{answered.mean():.1f}" if len(answered) else "-",
                    f"{np.percentile(answered, 95):.0f}" if len(answered) else "-",
                    f"{self.image_first[kind] / count:.1%}",
                ]
            )
        return rows


def gather(paths: Sequence[Path]) -> Kinds:
    """Read data files. A sample's kind is what its id ends with (``-conversation``), else the file's name.

    Raises:
        ConfigError, SampleError: a file cannot be read.
    """
    kinds = Kinds()
    for path in paths:
        for sample in load_samples(path):
            ending = sample["id"].rpartition("-")[2]
            kinds.add(ending if ending in ("conversation", "detail", "reasoning", "caption") else path.stem, sample)
    return kinds


def write_page(page: Path, paths: Sequence[Path], counts: dict[str, Any] | None = None) -> None:
    """Write the page, which needs no other file.

    Args:
        counts: what a run rejected, as in its summary.json.
    """
    kinds = gather(paths)
    pipeline = parser()
    title = "Root verb and noun of the instructions" if pipeline else "How the instructions begin"
    asked = {k: texts[:: max(1, len(texts) // MOST_QUESTIONS)] for k, texts in kinds.questions.items()}
    pairs = {k: verb_nouns(texts, pipeline) if pipeline else openings(texts) for k, texts in asked.items()}
    parts = [f"<h1>Instruction data</h1><p>{html.escape(', '.join(path.name for path in paths))}</p>"]
    parts += [
        _table(kinds.table()),
        "<h2>Lengths</h2>",
        _image(_draw_lengths(kinds), "lengths of questions and answers"),
    ]
    parts += [f"<h2>{title}</h2>", _image(_draw_pairs(pairs), title)]
    if not pipeline:
        parts.append(
            "<p>First word, and the first telling word after it. With spaCy installed: root verb and noun.</p>"
        )
    if counts and any(counts["rejected"].values()):
        parts += ["<h2>Left out</h2>", _table(_rejections(counts), "told")]
    text = _PAGE.replace("BODY", "\n".join(parts))
    part = page.with_name(page.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(page)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Instruction data</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2.5em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.15em; margin: 2em 0 .6em; }
p { color: #666; margin-top: .2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35em .9em; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; color: #555; } td:first-child, th:first-child { text-align: left; padding-left: 0; }

.told td:last-child, .told th:last-child { text-align: left; color: #666; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
</style></head><body>
BODY
</body></html>
"""


def _rejections(counts: dict[str, Any]) -> list[list[str]]:
    kinds = list(counts["rejected"])
    reasons = [reason for reason in REASONS if any(reason in counts["rejected"][kind] for kind in kinds)]
    rows = [["", *kinds, "what it means"]]
    for reason in reasons:
        rows.append([reason, *(f"{counts['rejected'][kind].get(reason, 0):,}" for kind in kinds), REASONS[reason]])
    return rows


def _table(rows: list[list[str]], look: str = "") -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows[1:])
    return f'<div class="wide"><table class="{look}">{line(rows[0], "th")}\n{body}</table></div>'


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight")
    _pyplot().close(figure)
    return buffer.getvalue()


def _draw_lengths(kinds: Kinds) -> bytes:
    """Histograms of the words of questions and answers, a line a kind."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(10, 2.9))
    for plot, lengths, label in zip(
        axes, (kinds.question_words, kinds.answer_words), ("words of a question", "words of an answer"), strict=True
    ):
        top = max((np.percentile(v, 99.5) for v in lengths.values() if v), default=1)
        step = int(np.ceil(top / 40))  # whole words, or bins would hold unequal numbers of lengths
        edges = np.arange(0, top + 2 * step, step)
        for color, (kind, values) in zip(COLORS * 9, lengths.items(), strict=False):
            plot.hist(values, edges, density=True, histtype="stepfilled", color=color, alpha=0.35, label=kind)
            plot.hist(values, edges, density=True, histtype="step", color=color)
        plot.set_xlabel(label)
        plot.set_yticks([])
        plot.spines[["left", "top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    return _save(figure)


def _draw_pairs(pairs: dict[str, Pairs]) -> bytes:
    """A ring a kind: the most frequent verbs inside, their most frequent nouns outside."""
    figure, axes = _pyplot().subplots(1, len(pairs), figsize=(6.4 * len(pairs), 6.4), squeeze=False)
    for plot, (kind, found) in zip(axes[0], pairs.items(), strict=True):
        _draw_ring(plot, found)
        plot.set_title(kind, fontsize=15, pad=64)
    figure.subplots_adjust(wspace=0.7)
    return _save(figure)


def _draw_ring(plot: Any, found: Pairs, verbs: int = 12, nouns: int = 4) -> None:
    by_verb: dict[str, Counter[str]] = defaultdict(Counter)
    for (verb, noun), count in found.items():
        by_verb[verb][noun] += count
    top = sorted(by_verb, key=lambda verb: -by_verb[verb].total())[:verbs]
    inner, outer, outer_names, inner_colors, outer_colors = [], [], [], [], []
    palette = _pyplot().get_cmap("tab20")
    for number, verb in enumerate(top):
        shown = by_verb[verb].most_common(nouns)
        color = palette((2 * number % 20) + (number >= 10))
        inner.append(sum(count for _, count in shown))
        inner_colors.append(color)
        for step, (noun, count) in enumerate(shown):
            outer.append(count)
            outer_names.append(noun)
            outer_colors.append((*color[:3], 0.75 - 0.14 * step))
    if not inner:
        plot.set_axis_off()
        return
    edge = {"linewidth": 1.2, "edgecolor": "white"}
    _ring(plot, outer, outer_names, outer_colors, radius=1.3, width=0.45, at=1.36, edge=edge, inside=False)
    _ring(plot, inner, top, inner_colors, radius=0.85, width=0.7, at=0.52, edge=edge, inside=True)


def _ring(
    plot: Any,
    sizes: list[int],
    names: list[str],
    colors: list[Any],
    *,
    radius: float,
    width: float,
    at: float,
    edge: dict[str, Any],
    inside: bool,
) -> None:
    """Wedges with their names along the radius; slivers go without a name."""
    wedges, *_ = plot.pie(sizes, radius=radius, colors=colors, startangle=90, wedgeprops={"width": width, **edge})
    for wedge, name in zip(wedges, names, strict=True):
        if wedge.theta2 - wedge.theta1 < 4.5:
            continue
        angle = (wedge.theta1 + wedge.theta2) / 2
        flip = 90 < angle % 360 < 270
        x, y = at * np.cos(np.deg2rad(angle)), at * np.sin(np.deg2rad(angle))
        align = "center" if inside else ("right" if flip else "left")
        plot.text(
            x,
            y,
            name,
            rotation=angle + 180 * flip,
            rotation_mode="anchor",
            ha=align,
            va="center",
            fontsize=10.5 if inside else 12,
            color="white" if inside else "#333",
            weight="bold" if inside else "normal",
        )


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(
        prog="python -m llava_fast.datagen statistics",
        description="A page about data files in the LLaVA JSON: counts, lengths, and what the instructions ask for.",
    )
    options.add_argument("data", nargs="+", type=Path, help="LLaVA JSON or JSONL files")
    options.add_argument("--out", type=Path, default=Path("statistics.html"), help="the page (default %(default)s)")
    args = options.parse_args(argv)
    write_page(args.out, args.data)
    print(args.out)
    return 0
