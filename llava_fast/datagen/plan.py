"""The plan: which kinds of data are wanted of which pictures, and about what they will cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from llava_fast.datagen.kinds import KINDS, Kind
from llava_fast.datagen.pictures import Picture
from llava_fast.datagen.prompting import Prompts
from llava_fast.errors import ConfigError
from llava_fast.teacher import count_tokens


@dataclass(frozen=True)
class Task:
    """One sample that is wanted."""

    picture: Picture
    kind: Kind


@dataclass(frozen=True)
class Plan:
    """Attributes: tasks: in the order of the output."""

    tasks: Sequence[Task]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def of(self, kind: Kind) -> list[Task]:
        return [task for task in self.tasks if task.kind is kind]


def make_plan(
    pictures: Sequence[Picture], kinds: Sequence[str], *, counts: dict[str, int], in_turn: bool, seed: int
) -> Plan:
    """Every kind of every picture, unless less is wanted.

    Args:
        counts: for a kind, how many pictures to draw for it; the paper has 58,000 conversations, 23,000
            descriptions and 77,000 of reasoning on some 80,000 pictures.
        in_turn: one kind a picture, the kinds in turn.

    Raises:
        ConfigError: pictures of equal id, or fewer of them than a count.
    """
    _check_ids(pictures)
    chosen: dict[str, set[int]] = {}
    for number, name in enumerate(kinds):
        places = range(number, len(pictures), len(kinds)) if in_turn else range(len(pictures))
        wanted = counts.get(name, len(places))
        if wanted > len(places):
            raise ConfigError(f"--count {name}={wanted}: there are {len(places)} pictures for it; ask for fewer")
        chosen[name] = set(places if name not in counts else Random(f"{seed}/{name}").sample(places, wanted))
    tasks = [
        Task(picture, KINDS[name]) for place, picture in enumerate(pictures) for name in kinds if place in chosen[name]
    ]
    return Plan(tasks)


def _check_ids(pictures: Sequence[Picture]) -> None:
    seen: set[str] = set()
    for picture in pictures:
        if picture.id in seen:
            raise ConfigError(f"two pictures have the id {picture.id!r}; give each its own, or leave ids out")
        seen.add(picture.id)


@dataclass(frozen=True)
class Estimate:
    """About what a plan takes when every first answer is good, of text counted at four characters a token."""

    requests: int
    prompt_tokens: int
    answer_tokens: int

    def tell(self, price: tuple[float, float]) -> str:
        text = f"{self.requests:,} requests, about {self.prompt_tokens:,} tokens of prompts"
        text += f" and {self.answer_tokens:,} of answers"
        if any(price):
            dollars = (self.prompt_tokens * price[0] + self.answer_tokens * price[1]) / 1e6
            return f"{text}: about ${dollars:,.2f}"
        return f"{text} (--price IN OUT turns them into dollars)"


def estimate(tasks: Sequence[Task], prompts: Prompts) -> Estimate:
    """Measure the contexts of up to 500 tasks of each kind; answers are taken to be as long as the examples'."""
    prompt_tokens = answer_tokens = 0.0
    for kind in KINDS.values():
        mine = [task for task in tasks if task.kind is kind]
        if not mine:
            continue
        sample = mine[:: max(1, len(mine) // 500)]
        lengths = [
            sum(count_tokens(str(message["content"])) + 4 for message in prompts.messages(kind, task.picture))
            for task in sample
        ]
        prompt_tokens += len(mine) * sum(lengths) / len(lengths)
        answer_tokens += len(mine) * prompts.answer_tokens(kind)
    return Estimate(len(tasks), round(prompt_tokens), round(answer_tokens))
