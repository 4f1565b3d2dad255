"""The built-in teacher: it answers by rule about the built-in scenes, so that the whole chain runs with no model.

It is a language-only teacher like any other: of a scene it knows what the last message says, captions (of which a
conversation is made) or captions and boxes (of which descriptions and reasoning are made), and it answers in the form
that the prompts ask for.
"""

from __future__ import annotations

import re
from random import Random

from llava_fast.data.scenes import (
    CANVAS,
    CELL,
    COLORS,
    FORMS,
    PLACES,
    SIZES,
    Scene,
    Shape,
    conversation,
    detail,
    reasoning,
)
from llava_fast.datagen.parse import Turn
from llava_fast.teacher import Message, Reply, TeacherError

_NAME = rf"({'|'.join(COLORS)}) ({'|'.join(FORMS)})"
_PLACES = {name: (row, column) for row, names in enumerate(PLACES) for column, name in enumerate(names)}
_PLACED = re.compile(rf"\ban? {_NAME} at the ({'|'.join(sorted(_PLACES, key=len, reverse=True))})\b")
_SIZED = re.compile(rf"\ban? ({'|'.join(SIZES)}) {_NAME}\b")
_BOXED = re.compile(rf"^{_NAME}: \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]$", re.MULTILINE)
_LARGE = sum(SIZES.values()) / 2 * CELL / CANVAS  # half the width of a shape between small and large, as a share


class RuleTeacher:
    """Teacher of the built-in scenes. The answers follow from the messages alone."""

    model = "rules"

    async def ask(
        self, messages: list[Message], *, max_tokens: int = 0, temperature: float = 0.0, draw: int = 0
    ) -> Reply:
        """As ``Teacher.ask``. Raises TeacherError where the last message is not about a built-in scene."""
        return self.answer(messages, draw)

    def answer(self, messages: list[Message], draw: int = 0) -> Reply:
        context = str(messages[-1]["content"])
        wants_talk = "Question:" in str(messages[0]["content"])
        rng = Random(f"{draw}/{context}")
        if not _BOXED.search(context):
            return Reply(_written(conversation(_from_captions(context), rng)))
        scene = _from_boxes(context)
        return Reply(_written(reasoning(scene, rng))) if wants_talk else Reply(detail(scene, rng)[0][1])


def _written(turns: list[Turn]) -> str:
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in turns)


def _from_captions(context: str) -> Scene:
    """The scene as far as its captions tell it: forms, colours, places and sizes."""
    sizes = {(color, form): size for size, color, form in _SIZED.findall(context)}
    places = {(color, form): place for color, form, place in _PLACED.findall(context)}
    if not places or set(places) != set(sizes):
        raise _not_a_scene(context)
    shapes = [_shape(form, color, sizes[color, form], *_PLACES[place]) for (color, form), place in places.items()]
    return _scene(shapes)


def _from_boxes(context: str) -> Scene:
    """The scene as its boxes tell it."""
    shapes = []
    for color, form, *edges in _BOXED.findall(context):
        left, top, right, bottom = map(float, edges)
        size = "large" if (right - left) / 2 > _LARGE else "small"
        shapes.append(_shape(form, color, size, int((top + bottom) / 2 * 3), int((left + right) / 2 * 3)))
    return _scene(shapes)


def _shape(form: str, color: str, size: str, row: int, column: int) -> Shape:
    return Shape(form, color, size, row, column, (column + 0.5) * CELL, (row + 0.5) * CELL, SIZES[size] * CELL)


def _scene(shapes: list[Shape]) -> Scene:
    return Scene(tuple(sorted(shapes, key=lambda s: (s.row, s.column))), (255, 255, 255))


def _not_a_scene(context: str) -> TeacherError:
    return TeacherError(
        f"the built-in teacher knows the built-in scenes alone, and this is none: {context[:60]!r}; give a model with "
        "--teacher-url and --teacher-model"
    )
