"""A page to read answers side by side: one HTML file with everything in it, pictures included."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from llava_fast.evaluate.bench import Item
from llava_fast.evaluate.files import write_whole
from llava_fast.evaluate.relative import Spread, by_run, spread
from llava_fast.evaluate.reviews import ORDERS, Review

_TEMPLATE = Path(__file__).with_name("page.html")
_WIDTH = 480  # pixels of the longer side of a picture in the page
_ORDER_WORDS = dict(zip(ORDERS, ("reference first", "candidate first"), strict=True))


@dataclass(frozen=True)
class Answerer:
    """Attributes: answers: by question; reviews: of them, of all runs; there may be none."""

    answers: Mapping[str, str]
    reviews: Sequence[Review]


def write_page(
    path: Path,
    items: Sequence[Item],
    answerers: Mapping[str, Answerer],
    images: Path | None,
    result: Mapping[str, Any],
    unparsable: str = "leave-out",
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        items: the questions.
        answerers: by name; the last is the one that ``result`` is about and that questions are sorted by.
        images: folder of the pictures; those that are not there are left out.
        result: what was measured.
        unparsable: as for :func:`llava_fast.evaluate.relative.score`.
    """
    data = {
        "title": f"{result['benchmark']}: {len(items)} questions",
        "subject": ", ".join(f"{name} {value}" for name, value in result["subject"].items() if value is not None),
        "note": f"Relative score: mean score over the reference's, in percent. Judge: {result['settings']['judge']}.",
        "scores": _scores(answerers, unparsable),
        "categories": list(dict.fromkeys(item.category for item in items)),
        "items": [_card(item, answerers, images) for item in items],
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it can end the script element
    write_whole(path, _TEMPLATE.read_text(encoding="utf-8").replace("{data}", text, 1))


def _scores(answerers: Mapping[str, Answerer], unparsable: str) -> list[list[str]]:
    found = {who: by_run(one.reviews, unparsable=unparsable) for who, one in answerers.items() if one.reviews}
    spreads = {who: spread(runs.values()) for who, runs in found.items()}
    names = list(dict.fromkeys(name for one in spreads.values() for name in one))
    suffix = {who: f", {who}" if len(found) > 1 else "" for who in found}
    rows = [["", *names]]
    rows += [
        [f"relative score{suffix[who]}", *(_percent(one[n]) if n in one else "-" for n in names)]
        for who, one in spreads.items()
    ]
    for who, runs in found.items():
        for side, label in (("reference", f"reference{f' beside {who}' if suffix[who] else ''}"), ("candidate", who)):
            values = [[getattr(scores[n], side) for scores in runs.values() if n in scores] for n in names]
            rows.append([f"mean score, {label}", *(f"{mean(v):.2f}" if v else "-" for v in values)])
    return rows


def _percent(one: Spread) -> str:
    if one.mean is None:
        return "-"
    return f"{one.mean:.1f}" + ("" if one.deviation is None else f" ± {one.deviation:.1f}")


def _card(item: Item, answerers: Mapping[str, Answerer], images: Path | None) -> dict[str, Any]:
    of_item = {who: [r for r in one.reviews if r.question_id == item.id] for who, one in answerers.items()}
    last = of_item[list(answerers)[-1]]
    shown = [{"who": "reference", "text": item.reference, "score": _mean_score(last, 0)}]
    shown += [
        {"who": who, "text": one.answers.get(item.id, ""), "score": _mean_score(of_item[who], 1)}
        for who, one in answerers.items()
    ]
    several = len(answerers) > 1
    return {
        "id": item.id,
        "category": item.category,
        "question": item.question,
        "image": item.image,
        "picture": None if images is None else _picture(images / item.image),
        "context": item.context,
        "answers": shown,
        "reviews": [
            {"label": _label(review, who if several else "answer"), "content": review.content}
            for who, reviews in of_item.items()
            for review in reviews
        ],
    }


def _mean_score(reviews: Sequence[Review], side: int) -> float | None:
    scores = [review.scores[side] for review in reviews if review.scores is not None]
    return mean(scores) if scores else None


def _label(review: Review, who: str) -> str:
    scores = "no scores" if review.scores is None else f"reference {review.scores[0]:g}, {who} {review.scores[1]:g}"
    return f"Judge, run {review.run + 1}, {_ORDER_WORDS[review.order]}: {scores}"


def _picture(path: Path) -> str | None:
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except OSError:
        return None
    small.thumbnail((_WIDTH, _WIDTH))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
