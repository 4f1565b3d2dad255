"""The three kinds of instruction data, and what of a picture a teacher is told for each (section 3 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass

from llava_fast.datagen.pictures import Picture


@dataclass(frozen=True)
class Kind:
    """Attributes:
    folder: of its prompts.
    boxes: whether the teacher is told the boxes, or the captions alone.
    questions: the teacher's own: any number, one, or none (then it is drawn from a list).
    """

    name: str
    folder: str
    boxes: bool
    questions: str

    def context(self, picture: Picture) -> str:
        """The picture in words: a caption a line; with boxes, after a blank line, ``category: [x1, y1, x2, y2]``."""
        captions = "\n".join(picture.captions)
        if not self.boxes or not picture.objects:
            return captions
        return captions + "\n\n" + "\n".join(f"{one.category}: {list(one.box)}" for one in picture.objects)


KINDS = {
    "conversation": Kind("conversation", "conversation", boxes=False, questions="many"),
    "detail": Kind("detail", "detail_description", boxes=True, questions="none"),
    "reasoning": Kind("reasoning", "complex_reasoning", boxes=True, questions="one"),
}
