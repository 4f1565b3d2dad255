"""The judge of LLaVA-Bench: a teacher that reads the picture's description and scores two answers."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from llava_fast.data.scenes import COLORS, FORMS, NUMBERS, PLACES, SIZES
from llava_fast.evaluate.asking import Question
from llava_fast.evaluate.bench import Item
from llava_fast.evaluate.reviews import ORDERS
from llava_fast.evaluate.wording import conversation, fill, wording
from llava_fast.teacher import Message, Reply

_PROMPT_OF = {"coco": "judge_coco", "wild": "judge_wild", "scenes": "judge_coco"}
_PLACES = ("context", "question", "first", "second")


def judge_texts(bench: str, prompt: Path | None, system: Path | None) -> tuple[str, str]:
    """System text and prompt: this package's own for the set, or the user's files.

    Raises:
        ConfigError: a file cannot be read, or the prompt lacks a place for context, question or answers.
    """
    return wording("judge_system", system), wording(_PROMPT_OF[bench], prompt, _PLACES)


def judge_questions(
    items: Sequence[Item], answers: Mapping[str, str], texts: tuple[str, str], *, runs: int, both_orders: bool
) -> list[Question]:
    """One question an item, run and order; the reference answer stands first unless both orders are asked for."""
    return [
        Question(
            f"{item.id}/{run}/{order}",
            conversation(texts[0], _prompt(texts[1], item, answers[item.id], order)),
            {"question_id": item.id, "category": item.category, "run": run, "order": order},
            draw=run,
        )
        for run in range(runs)
        for order in (ORDERS if both_orders else ORDERS[:1])
        for item in items
    ]


def _prompt(text: str, item: Item, answer: str, order: str) -> str:
    first, second = (item.reference, answer) if order == ORDERS[0] else (answer, item.reference)
    return fill(text, context=item.context, question=item.question, first=first, second=second)


class RuleJudge:
    """A judge for the built-in scenes alone, that needs no language model: it counts facts.

    A fact is a colour, form, place, size, number, or a yes or no; what the question itself says is none, unless it
    offers a choice. The reference gets 10; an answer gets 1 to 10 by the F1 of its facts against the reference's. No
    notice is taken of grammar, or of which fact is said of which shape.
    """

    def __init__(self, items: Sequence[Item], answers: Mapping[str, str], texts: tuple[str, str]):
        self._pairs = {
            _prompt(texts[1], item, answers[item.id], order): (item, answers[item.id], order)
            for item in items
            for order in ORDERS
        }

    async def ask(self, messages: list[Message], *, max_tokens: int, temperature: float, draw: int = 0) -> Reply:
        await asyncio.sleep(0)
        item, answer, order = self._pairs[messages[-1]["content"]]
        given = set() if " or " in item.question else set(facts_of(item.question))
        right, said = facts_of(item.reference, given), facts_of(answer, given)
        mine = 1 + 9 * f1(right, said)
        scores = (10.0, mine) if order == ORDERS[0] else (mine, 10.0)
        missing, wrong = sorted((right - said).elements()), sorted((said - right).elements())
        reasons = (
            f"Facts missing: {', '.join(missing) or 'none'}. Facts that do not agree: {', '.join(wrong) or 'none'}."
        )
        return Reply(f"{scores[0]:.2f} {scores[1]:.2f}\n{reasons}")


_ALTERNATIVES = "|".join(
    sorted(
        {*COLORS, *FORMS, *SIZES, *NUMBERS, *(place for row in PLACES for place in row), "yes", "no", "higher"},
        key=len,
        reverse=True,
    )
)
_FACT = re.compile(rf"\b({_ALTERNATIVES})s?\b")


def facts_of(text: str, without: Collection[str] = ()) -> Counter[str]:
    """The facts in a text about a scene, and how often each is said."""
    return Counter(fact for fact in _FACT.findall(text.lower()) if fact not in without)


def f1(right: Counter[str], said: Counter[str]) -> float:
    """Harmonic mean of precision and recall; 1 where both are empty."""
    total = right.total() + said.total()
    return 2 * (right & said).total() / total if total else 1.0
