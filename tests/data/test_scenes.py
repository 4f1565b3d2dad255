"""The built-in data set: answers that are true of the pixels, sets that do not overlap, files that train."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import numpy as np
import pytest

from llava_fast.data.samples import load_samples
from llava_fast.data.scenes import (
    CANVAS,
    COLORS,
    FORMS,
    QUESTIONS,
    Scene,
    Scenes,
    Shape,
    held_out,
    reasoning,
    scene_at,
    write,
)


@pytest.mark.parametrize("index", range(30))
def test_every_shape_is_where_its_box_says_in_its_colour(index):
    scene, _ = scene_at(1, index)
    pixels = np.asarray(scene.image())
    for shape in scene.shapes:
        assert tuple(pixels[round(shape.y), round(shape.x)]) == COLORS[shape.color]
        left, top, right, bottom = (round(v * CANVAS) for v in shape.box)
        mine = (pixels == COLORS[shape.color]).all(-1)
        rows, columns = mine.nonzero()
        assert left - 1 <= columns.min() and columns.max() <= right + 1
        assert top - 1 <= rows.min() and rows.max() <= bottom + 1
        assert (int(shape.y // (CANVAS / 3)), int(shape.x // (CANVAS / 3))) == (shape.row, shape.column)


def test_no_two_shapes_share_a_colour_or_a_form():
    for index in range(200):
        shapes = scene_at(1, index)[0].shapes
        assert len({s.color for s in shapes}) == len({s.form for s in shapes}) == len(shapes)


def test_answers_by_hand():
    scene = Scene(
        (
            Shape("circle", "red", "large", 0, 0, 24, 24, 20),
            Shape("star", "blue", "small", 2, 1, 72, 120, 12),
        ),
        (240, 240, 240),
    )
    answers = {kind: {ask(scene, Random(i)) for i in range(60)} for kind, ask in QUESTIONS.items()}
    assert answers["color"] == {
        ("What color is the circle?", "The circle is red."),
        ("What color is the star?", "The star is blue."),
    }
    assert ("Where is the blue star?", "The blue star is at the bottom.") in answers["place"]
    assert ("Is the circle small or large?", "The circle is large.") in answers["size"]
    assert answers["count"] == {("How many shapes are there?", "There are two shapes.")}
    assert ("Is there a circle?", "Yes, there is a circle.") in answers["whether"]
    assert ("Is there an orange shape?", "No, there is no orange shape.") in answers["whether"]
    there = {"a circle?", "a star?", "a red shape?", "a blue shape?"}
    assert all((q.removeprefix("Is there ") in there) == a.startswith("Yes") for q, a in answers["whether"])
    told = {turn for i in range(60) for turn in reasoning(scene, Random(i))}
    why = "The circle is at the top left and the star is at the bottom. So the circle is higher."
    assert ("Which is higher, the circle or the star?", why) in told
    gone = "There are two shapes. Without the red circle, one remains."
    assert ("How many shapes remain if the red one is taken away?", gone) in told


def test_sets_are_repeatable_and_do_not_overlap():
    def seen(seed):
        return {Scenes(300, seed)[i]["image"].tobytes() for i in range(300)}

    assert seen(1) == seen(1)
    assert not seen(1) & seen(2)
    assert len(seen(1)) == 300


def test_questions_are_balanced():
    """No question can be answered well by always saying the same."""
    quizzes = held_out(6000, 9)
    assert {q.kind for q in quizzes} == set(QUESTIONS)
    yes = Counter(q.answer.split(",")[0] for q in quizzes if q.kind == "whether")
    assert yes["Yes"] / sum(yes.values()) == pytest.approx(0.5, abs=0.05)
    colors = Counter(q.answer.split()[-1] for q in quizzes if q.kind == "color")
    assert max(colors.values()) / sum(colors.values()) < 1.5 / len(COLORS)
    forms = Counter(q.answer.split()[-1] for q in quizzes if q.kind == "form")
    assert len(forms) == len(FORMS)


def test_written_files_are_llava_json(tmp_path):
    path = write(tmp_path, 9, 4)
    samples = load_samples(path, tmp_path)
    assert len(samples) == 9
    assert samples[0]["conversations"][0]["value"].startswith("<image>\n")
    extra = json.loads(path.read_text())[0]
    assert len(extra["captions"]) == 5
    assert all(set(box) == {"category", "bbox"} for box in extra["boxes"])
