"""Conversation: what was asked and answered, and the pictures that wait for the next question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """Attributes:
    name: absolute path, or the address it came from.
    image: upright RGB, read once: what the file says later does not change what was talked about.
    """

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Turn:
    """A question with its pictures, and the answer; None while there is none."""

    question: str
    pictures: Sequence[Picture] = ()
    answer: str | None = None


@dataclass
class Conversation:
    """Attributes:
    system: replaces the template's own system text; None leaves that.
    turns: answered, oldest first. Nothing is ever dropped from it but by the user.
    waiting: pictures that go with the next question.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Picture] = field(default_factory=list)

    def messages(self, last: Turn | None = None) -> list[dict[str, Any]]:
        """All turns, then ``last``, in OpenAI form. Pictures stand before the text of their question."""
        said: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in (*self.turns, *([] if last is None else [last])):
            pictures = [{"type": "image", "image": picture.image} for picture in turn.pictures]
            text = {"type": "text", "text": turn.question}
            said.append({"role": "user", "content": [*pictures, text] if pictures else turn.question})
            if turn.answer is not None:
                said.append({"role": "assistant", "content": turn.answer})
        return said

    def reset(self) -> None:
        """Forget turns and pictures; the system text stays."""
        self.turns.clear()
        self.waiting.clear()
