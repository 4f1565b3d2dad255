"""Scenes: the built-in data set, pictures of coloured shapes with captions, boxes and instruction data.

A scene is one to four shapes in the cells of a 3 x 3 grid; no two share a colour or a form, so that every question has
one answer. From its captions and boxes the three kinds of instruction data of the paper (section 3) are made by rule:
conversation, detailed description and reasoning. Everything is drawn from (seed, index) alone, so two sets with
different seeds are a training set and a held-out set, and nothing has to be stored.

    python -m llava_fast.data.scenes FOLDER --count 1000 --seed 1     # writes the set as LLaVA JSON and PNG files
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 190),
    "orange": (245, 130, 32),
    "cyan": (40, 190, 210),
    "black": (30, 30, 34),
}
FORMS = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = {"small": 0.32, "large": 0.47}  # half the width, as a share of the cell
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
NUMBERS = ("zero", "one", "two", "three", "four")
CANVAS = 144  # pixels, square
CELL = CANVAS // 3
KINDS = ("caption", "conversation", "detail", "reasoning")


@dataclass(frozen=True)
class Shape:
    """One shape of a scene. Center and radius in pixels of the canvas."""

    form: str
    color: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def name(self) -> str:
        return f"{self.color} {self.form}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) as shares of the canvas, rounded to three places as in the paper's contexts."""
        r = self.radius
        left, top, right, bottom = (round(v / CANVAS, 3) for v in (self.x - r, self.y - r, self.x + r, self.y + r))
        return left, top, right, bottom


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order (top to bottom, left to right) on a plain background."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]

    @staticmethod
    def draw_from(rng: Random) -> Scene:
        count = rng.randint(1, 4)
        cells = sorted(rng.sample(range(9), count))
        forms, colors = rng.sample(FORMS, count), rng.sample(tuple(COLORS), count)
        shapes = []
        for cell, form, color in zip(cells, forms, colors, strict=True):
            size = rng.choice(tuple(SIZES))
            row, column = divmod(cell, 3)
            radius = SIZES[size] * CELL * rng.uniform(0.95, 1.05)
            slack = CELL / 2 - radius
            x = (column + 0.5) * CELL + rng.uniform(-slack, slack) * 0.6
            y = (row + 0.5) * CELL + rng.uniform(-slack, slack) * 0.6
            shapes.append(Shape(form, color, size, row, column, x, y, radius))
        light = rng.randint(214, 250)
        background = (light + rng.randint(-6, 5), light + rng.randint(-6, 5), light + rng.randint(-6, 5))
        return Scene(tuple(shapes), background)

    def image(self) -> Image.Image:
        """The picture, RGB, CANVAS x CANVAS pixels, edges smoothed by drawing at twice the size."""
        big = Image.new("RGB", (2 * CANVAS, 2 * CANVAS), self.background)
        pen = ImageDraw.Draw(big)
        for shape in self.shapes:
            _draw(pen, shape.form, 2 * shape.x, 2 * shape.y, 2 * shape.radius, COLORS[shape.color])
        return big.reduce(2)

    def captions(self, rng: Random) -> list[str]:
        """Five sentences about the scene, as COCO gives five captions for a picture."""
        names = _listing([_a(s.name) for s in self.shapes])
        placed = _listing([f"{_a(s.name)} at the {s.place}" for s in self.shapes])
        sized = _listing([_a(f"{s.size} {s.name}") for s in self.shapes])
        one = rng.choice(self.shapes)
        count = NUMBERS[len(self.shapes)]
        plural = "shape" if len(self.shapes) == 1 else "shapes"
        return [
            f"{names} on a light background.",
            f"a picture of {placed}.",
            f"{count} {plural}: {sized}.",
            f"a drawing with {_a(one.name)} at the {one.place}.",
            f"a light picture with {count} colored {plural}.",
        ]

    def boxes(self) -> list[dict[str, Any]]:
        """One entry a shape: ``{"category": "red circle", "bbox": (left, top, right, bottom)}`` in shares."""
        return [{"category": s.name, "bbox": s.box} for s in self.shapes]


def _draw(pen: ImageDraw.ImageDraw, form: str, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    if form == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif form == "square":
        s = 0.86 * r
        pen.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    elif form == "cross":
        arm = 0.34 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    else:
        pen.polygon([(x + r * u, y + r * v) for u, v in _CORNERS[form]], fill=fill)


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "star": [
        (0, -1),
        (0.24, -0.31),
        (0.95, -0.31),
        (0.38, 0.13),
        (0.59, 0.81),
        (0, 0.4),
        (-0.59, 0.81),
        (-0.38, 0.13),
        (-0.95, -0.31),
        (-0.24, -0.31),
    ],
}


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# ---- questions: each takes a scene and returns (question, answer) ------------------------------------------------

Turn = tuple[str, str]


def ask_color(scene: Scene, rng: Random) -> Turn:
    shape = rng.choice(scene.shapes)
    return f"What color is the {shape.form}?", f"The {shape.form} is {shape.color}."


def ask_form(scene: Scene, rng: Random) -> Turn:
    shape = rng.choice(scene.shapes)
    return f"Which shape is {shape.color}?", f"The {shape.color} shape is a {shape.form}."


def ask_place(scene: Scene, rng: Random) -> Turn:
    shape = rng.choice(scene.shapes)
    return f"Where is the {shape.name}?", f"The {shape.name} is at the {shape.place}."


def ask_size(scene: Scene, rng: Random) -> Turn:
    shape = rng.choice(scene.shapes)
    return f"Is the {shape.form} small or large?", f"The {shape.form} is {shape.size}."


def ask_count(scene: Scene, rng: Random) -> Turn:
    return "How many shapes are there?", _count_answer(scene)


def _count_answer(scene: Scene) -> str:
    n = len(scene.shapes)
    return "There is one shape." if n == 1 else f"There are {NUMBERS[n]} shapes."


def ask_whether(scene: Scene, rng: Random) -> Turn:
    """Half the time about a form or a colour that is there, half the time about one that is not."""
    there = rng.random() < 0.5
    if rng.random() < 0.5:
        what = _a(_one_of(FORMS, [s.form for s in scene.shapes], there, rng))
    else:
        what = _a(_one_of(tuple(COLORS), [s.color for s in scene.shapes], there, rng) + " shape")
    return f"Is there {what}?", f"Yes, there is {what}." if there else f"No, there is no {what.split(' ', 1)[1]}."


def _one_of(every: Sequence[str], present: Sequence[str], there: bool, rng: Random) -> str:
    return rng.choice(present) if there else rng.choice([name for name in every if name not in present])


QUESTIONS: dict[str, Callable[[Scene, Random], Turn]] = {
    "color": ask_color,
    "form": ask_form,
    "place": ask_place,
    "size": ask_size,
    "count": ask_count,
    "whether": ask_whether,
}

CAPTION_REQUESTS = (
    "What does the picture show, in one line?",
    "Sum up this picture briefly.",
    "Caption this picture.",
    "Say shortly what can be seen here.",
)

DETAIL_REQUESTS = (
    "Tell me everything that this picture shows.",
    "Describe the picture with all its details.",
    "Go through the picture part by part.",
    "What is in the picture, where, and how large?",
)


def conversation(scene: Scene, rng: Random) -> list[Turn]:
    """A question of every kind, in any order."""
    return [QUESTIONS[kind](scene, rng) for kind in rng.sample(tuple(QUESTIONS), len(QUESTIONS))]


def detail(scene: Scene, rng: Random) -> list[Turn]:
    """One request for a description, and a sentence on every shape in reading order."""
    sentences = [f"{_a(f'{s.size} {s.name}')} is at the {s.place}." for s in scene.shapes]
    sentences = [s[0].upper() + s[1:] for s in sentences]
    return [(rng.choice(DETAIL_REQUESTS), " ".join([_count_answer(scene), *sentences]))]


def reasoning(scene: Scene, rng: Random) -> list[Turn]:
    """One question whose answer needs a step beyond what is seen; the answer gives the step."""
    if len(scene.shapes) > 1 and rng.random() < 0.5:
        a, b = rng.sample(scene.shapes, 2)
        if a.row != b.row:
            higher = a if a.row < b.row else b
            why = f"The {a.form} is at the {a.place} and the {b.form} is at the {b.place}."
            return [(f"Which is higher, the {a.form} or the {b.form}?", f"{why} So the {higher.form} is higher.")]
        left = a if a.column < b.column else b
        why = f"The {a.form} is at the {a.place} and the {b.form} is at the {b.place}."
        question = f"Which is further left, the {a.form} or the {b.form}?"
        return [(question, f"{why} So the {left.form} is further left.")]
    gone = rng.choice(scene.shapes)
    left_over = len(scene.shapes) - 1
    return [
        (
            f"How many shapes remain if the {gone.color} one is taken away?",
            f"{_count_answer(scene)} Without the {gone.name}, {NUMBERS[left_over]} {_remain(left_over)}.",
        )
    ]


def _remain(count: int) -> str:
    return "remains" if count == 1 else "remain"


# ---- samples -----------------------------------------------------------------------------------------------------


def scene_at(seed: int, index: int) -> tuple[Scene, Random]:
    """Scene number ``index`` of the set ``seed``, and the generator to draw its texts with."""
    rng = Random(f"{seed}/{index}")
    return Scene.draw_from(rng), rng


def turns_for(scene: Scene, kind: str, rng: Random) -> list[Turn]:
    if kind == "caption":
        return [(rng.choice(CAPTION_REQUESTS), rng.choice(scene.captions(rng)[:3]))]
    return {"conversation": conversation, "detail": detail, "reasoning": reasoning}[kind](scene, rng)


class Scenes:
    """``count`` samples in the LLaVA JSON form, images as PIL pictures, made when they are asked for.

    Args:
        count: number of samples.
        seed: of the set.
        kinds: what the samples are, in turn: of "caption" (stage 1), "conversation", "detail", "reasoning" (stage 2).
    """

    def __init__(self, count: int, seed: int, kinds: Sequence[str] = KINDS[1:]):
        self.size, self.seed, self.kinds = count, seed, tuple(kinds)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        scene, rng = scene_at(self.seed, index)
        kind = self.kinds[index % len(self.kinds)]
        return as_sample(f"scene-{self.seed}-{index}-{kind}", scene.image(), turns_for(scene, kind, rng))


def as_sample(sample_id: str, image: Any, turns: Sequence[Turn]) -> dict[str, Any]:
    """A sample in the LLaVA JSON form, the image before the first question."""
    values = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    values[0]["value"] = "<image>\n" + values[0]["value"]
    return {"id": sample_id, "image": image, "conversations": values}


@dataclass(frozen=True)
class Quiz:
    """One held-out question about one picture."""

    kind: str
    image: Image.Image
    question: str
    answer: str


def held_out(count: int, seed: int) -> list[Quiz]:
    """``count`` questions, every kind in turn, about scenes of a set that no training run uses when seeds differ."""
    kinds = tuple(QUESTIONS)
    quizzes = []
    for index in range(count):
        scene, rng = scene_at(seed, index)
        kind = kinds[index % len(kinds)]
        quizzes.append(Quiz(kind, scene.image(), *QUESTIONS[kind](scene, rng)))
    return quizzes


def write(folder: Path, count: int, seed: int, kinds: Sequence[str] = KINDS[1:]) -> Path:
    """Write a set as ``scenes.json`` (LLaVA JSON with captions and boxes beside) and ``images``; returns the JSON."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    scenes = Scenes(count, seed, kinds)
    for index in range(count):
        sample = scenes[index]
        scene, rng = scene_at(seed, index)
        name = f"images/{index:06d}.png"
        sample["image"].save(folder / name)
        samples.append({**sample, "image": name, "captions": scene.captions(rng), "boxes": scene.boxes()})
    path = folder / "scenes.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(samples, indent=1))
    temporary.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.data.scenes", description="Write the built-in data set as LLaVA JSON and PNG files."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="number of samples (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the set (default %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[1:], help="what the samples are, in turn")
    args = parser.parse_args()
    print(write(args.folder, args.count, args.seed, args.kinds))


if __name__ == "__main__":
    main()
