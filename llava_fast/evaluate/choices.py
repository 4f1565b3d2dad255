"""From what a model said to the choice that it meant: the rules of the authors' ``eval_science_qa.py``."""

from __future__ import annotations

import re
from random import Random

LETTERS = "ABCDE"
FALLBACKS = ("wrong", "random")
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as the authors have it


def find_letter(text: str) -> str | None:
    """The letter that ``text`` names, or None where it names none or more than one.

    In this order: the letter alone; a letter, a dot and a space at the beginning; "The answer is X." exactly once.
    """
    text = text.strip()
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def find_choice(text: str, choices: int) -> int | None:
    """The number of the choice that ``text`` names, from 0; None where it names none of the ``choices``."""
    letter = find_letter(text)
    number = -1 if letter is None else LETTERS.find(letter)
    return number if 0 <= number < choices else None


def guess(problem_id: str, choices: int, seed: int) -> int:
    """What the authors' first release took where nothing was named: any choice. The same one in every run."""
    return Random(f"{seed}/{problem_id}").randrange(choices)
