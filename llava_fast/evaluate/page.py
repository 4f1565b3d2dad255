"""A page to read answers side by side: one HTML file with everything in it, pictures included."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from llava_fast.evaluate.bench import Item
from llava_fast.evaluate.files import write_whole
from llava_fast.evaluate.reviews import ORDERS, Review

_TEMPLATE = Path(__file__).with_name("page.html")
_WIDTH = 480  # pixels of the longer side of a picture in the page
_ORDER_WORDS = dict(zip(ORDERS, ("reference first", "candidate first"), strict=True))


def write_page(
    path: Path,
    items: Sequence[Item],
    answers: Mapping[str, Mapping[str, str]],
    reviews: Sequence[Review],
    images: Path | None,
    result: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        items: the questions.
        answers: by who gave them, then by question; the last is the one that was reviewed.
        reviews: of all runs.
        images: folder of the pictures; those that are not there are left out.
        result: what was measured.
    """
    data = {
        "title": f"{result['benchmark']}: {len(items)} questions",
        "subject": ", ".join(f"{name} {value}" for name, value in result["subject"].items() if value is not None),
        "note": f"Relative score: mean score over the reference's, in percent. Judge: {result['settings']['judge']}.",
        "scores": _scores(result),
        "categories": list(dict.fromkeys(item.category for item in items)),
        "items": [_card(item, answers, [r for r in reviews if r.question_id == item.id], images) for item in items],
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it can end the script element
    write_whole(path, _TEMPLATE.read_text(encoding="utf-8").replace("{data}", text, 1))


def _scores(result: Mapping[str, Any]) -> list[list[str]]:
    spread = result["scores"]["spread"]
    rows = [["", *spread], ["relative score", *(_percent(one) for one in spread.values())]]
    for who in ("reference", "candidate"):
        values = [[run[name][who] for run in result["scores"]["runs"] if name in run] for name in spread]
        rows.append([f"mean score, {who}", *(f"{mean(v):.2f}" for v in values)])
    return rows


def _percent(one: Mapping[str, float | None]) -> str:
    if one["mean"] is None:
        return "-"
    return f"{one['mean']:.1f}" + ("" if one["deviation"] is None else f" ± {one['deviation']:.1f}")


def _card(
    item: Item, answers: Mapping[str, Mapping[str, str]], reviews: Sequence[Review], images: Path | None
) -> dict[str, Any]:
    pairs = [review.scores for review in reviews if review.scores is not None]
    *others, reviewed = answers
    shown = [{"who": "reference", "text": item.reference, "score": mean(p[0] for p in pairs) if pairs else None}]
    shown += [{"who": who, "text": answers[who].get(item.id, ""), "score": None} for who in others]
    last = {"who": reviewed, "text": answers[reviewed][item.id], "score": mean(p[1] for p in pairs) if pairs else None}
    return {
        "id": item.id,
        "category": item.category,
        "question": item.question,
        "image": item.image,
        "picture": None if images is None else _picture(images / item.image),
        "context": item.context,
        "answers": [*shown, last],
        "reviews": [{"label": _label(review), "content": review.content} for review in reviews],
    }


def _label(review: Review) -> str:
    scores = "no scores" if review.scores is None else f"reference {review.scores[0]:g}, answer {review.scores[1]:g}"
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
