"""The questions of LLaVA-Bench, with reference answers and what the judge is told about each picture.

- ``coco``: 30 pictures of COCO val 2014, three questions each; captions and boxes for the judge.
- ``wild``: 24 pictures, 60 questions; a description written by hand for the judge.
- ``scenes``: the built-in pictures, so that the whole chain runs with nothing downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.data.scenes import QUESTIONS, detail, reasoning, scene_at
from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import read_rows

CATEGORIES = ("conv", "detail", "complex")
SETS = ("coco", "wild", "scenes")
FILES = {  # questions, reference answers, contexts: as the authors name them
    "coco": ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl", "caps_boxes_coco2014_val_80.jsonl"),
    "wild": ("questions.jsonl", "answers_gpt4.jsonl", "context.jsonl"),
}
SCENES_SEED = 90210  # of a set of scenes that no training run of this package draws from


@dataclass(frozen=True)
class Item:
    """Attributes:
    id: of the question.
    image: its name in the folder of images.
    question: what is asked.
    category: "conv", "detail" or "complex".
    context: what the judge is told about the picture.
    reference: the reference answer.
    """

    id: str
    image: str
    question: str
    category: str
    context: str
    reference: str


def read_bench(questions: Path, references: Path, contexts: Path) -> list[Item]:
    """The questions with what belongs to them.

    Args:
        questions: JSONL of ``question_id``, ``image``, ``text``, ``category``.
        references: JSONL of ``question_id``, ``text``.
        contexts: JSONL of ``image`` and either ``caption``, or ``captions`` and ``instances`` with boxes.

    Raises:
        ConfigError: a file is malformed, or a question has no reference or no context.
    """
    answers = {str(row["question_id"]): row["text"] for row in read_rows(references, ("question_id", "text"))}
    told = {Path(row["image"]).name: context_of(row) for row in read_rows(contexts, ("image",))}
    items = []
    for row in read_rows(questions, ("question_id", "image", "text", "category")):
        number, image = str(row["question_id"]), Path(row["image"]).name
        image_known = image if image in told else image.rpartition("_")[2]  # COCO_val2014_000000000042.jpg
        if number not in answers:
            raise ConfigError(f"question {number} of {questions} has no answer in {references}; take files of one set")
        if image_known not in told:
            raise ConfigError(f"{image} of question {number} is not described in {contexts}; take files of one set")
        items.append(
            Item(number, row["image"], row["text"], category_of(row["category"]), told[image_known], answers[number])
        )
    return items


def context_of(row: dict[str, Any]) -> str:
    """Captions, and below an empty line the boxes, one object a line, as the paper's contexts have them."""
    captions = row.get("captions", row.get("caption", ""))
    text = captions if isinstance(captions, str) else "\n".join(captions)
    boxes = [f"{one['category']}: {list(one['bbox'])}" for one in row.get("instances", ())]
    return "\n\n".join(part for part in (text, "\n".join(boxes)) if part)


def category_of(name: str) -> str:
    """ "conv" from "conv", "llava_bench_conv" or "conversation"."""
    bare = name.removeprefix("llava_bench_")
    return {"conversation": "conv", "reasoning": "complex"}.get(bare, bare)


def scenes_bench(count: int, images: Path) -> list[Item]:
    """``count`` questions about as many built-in pictures, which are written under ``images``."""
    images.mkdir(parents=True, exist_ok=True)
    kinds = tuple(QUESTIONS)
    items = []
    for index in range(count):
        scene, rng = scene_at(SCENES_SEED, index)
        category = CATEGORIES[index % 3]
        if category == "conv":
            question, reference = QUESTIONS[kinds[index // 3 % len(kinds)]](scene, rng)
        else:
            question, reference = (detail if category == "detail" else reasoning)(scene, rng)[0]
        row = {"captions": scene.captions(rng), "instances": scene.boxes()}
        name = f"{index:04d}.png"
        if not (images / name).is_file():
            scene.image().save(images / name)
        items.append(Item(str(index), name, question, category, context_of(row), reference))
    return items
