"""Prompts: the system message and the worked examples of a kind, text files that a user can replace.

A folder of prompts has a folder for each kind (``conversation``, ``detail_description``, ``complex_reasoning``) with
``system_message.txt`` and pairs ``000_caps.txt`` (a context), ``000_conv.txt`` (a good answer to it): the layout of the
authors' repository, so that theirs can be given as it is. ``questions.txt`` in ``detail_description`` lists what a
detailed description can be asked for with, a question a line; the built-in list is taken where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_fast.datagen.kinds import KINDS, Kind
from llava_fast.datagen.pictures import Picture
from llava_fast.errors import ConfigError
from llava_fast.teacher import Message, count_tokens

BUILT_IN = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Prompts:
    """Attributes:
    system: text for each kind.
    shots: for each kind, (context, answer) pairs that show the teacher what is wanted.
    questions: that ask for a detailed description.
    """

    system: dict[str, str]
    shots: dict[str, list[tuple[str, str]]]
    questions: tuple[str, ...]

    def messages(self, kind: Kind, picture: Picture) -> list[Message]:
        """What the teacher is sent: system, the examples as turns, the picture's context."""
        turns: list[Message] = [{"role": "system", "content": self.system[kind.name]}]
        for context, answer in self.shots[kind.name]:
            turns += [{"role": "user", "content": context}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": kind.context(picture)}]

    def answer_tokens(self, kind: Kind) -> float:
        """About how long an answer will be: as long as those of the examples."""
        answers = [answer for _, answer in self.shots[kind.name]]
        return sum(map(count_tokens, answers)) / len(answers) if answers else 250.0


def read_prompts(folder: Path = BUILT_IN, questions: Path | None = None) -> Prompts:
    """The prompts of a folder.

    Args:
        questions: a file that stands for ``questions.txt``.

    Raises:
        ConfigError: a file is missing or empty.
    """
    system = {kind.name: _text(folder / kind.folder / "system_message.txt") for kind in KINDS.values()}
    shots = {kind.name: _shots(folder / kind.folder) for kind in KINDS.values()}
    return Prompts(system, shots, read_questions(questions or _questions_file(folder)))


def read_questions(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not blank."""
    return tuple(line.strip() for line in _text(path).splitlines() if line.strip())


def _questions_file(folder: Path) -> Path:
    own = folder / KINDS["detail"].folder / "questions.txt"
    return own if own.exists() else BUILT_IN / KINDS["detail"].folder / "questions.txt"


def _shots(folder: Path) -> list[tuple[str, str]]:
    contexts = sorted(folder.glob("*_caps.txt"))
    return [(_text(path), _text(path.with_name(path.name.replace("_caps", "_conv")))) for path in contexts]


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); a folder of prompts needs it, in UTF-8") from error
    if not text:
        raise ConfigError(f"{path} is empty; write a prompt into it")
    return text
