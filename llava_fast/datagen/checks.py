"""Checks: what a teacher's answer must not be or say before it becomes training data.

A picture's words are the teacher's only source, and the assistant that learns from the answers will have the picture
instead: an answer that speaks of captions, or that recites the numbers of a box, would teach it to speak of what is not
there (the paper's prompts ask the teacher not to).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_fast.datagen.kinds import Kind
from llava_fast.datagen.parse import Turn, Unparsable, parse_description, parse_turns
from llava_fast.processor.conversation import IMAGE_MARK
from llava_fast.teacher import Reply

REASONS = {
    "empty": "nothing was said, or a question or an answer is empty",
    "refusal": "the teacher declined",
    "cut off": "the answer was ended by the bound on its length",
    "unparsable": "not in the form that was asked for",
    "source": "speaks of captions or descriptions as its source",
    "coordinates": "speaks of boxes or coordinates",
    "box": "recites the numbers of a box",
    "marks": "holds a mark of a conversation template or of an image",
    "repeated": "a question that was asked before in the same conversation",
    "duplicate": "the same text as an earlier sample's",
}

_GIVEN = r"(?:provided|given|supplied|listed|mentioned|above|following|original|five|several|different|various|image)"
_SOURCE = re.compile(
    r"\b(?:the|these|those|this|all|both|each|any|no|your|some|most|one|two|three|four|five|of|in|by|from|to)\s+"
    rf"(?:of\s+the\s+)?(?:{_GIVEN}\s+)*captions?\b"
    rf"|\b(?:{_GIVEN}\s+)(?:sentences?|descriptions?|captions?)\b"
    r"|\b(?:sentences?|descriptions?|captions?|information|context)\s+(?:that\s+(?:were|was|are|is)\s+)?"
    r"(?:provided|given|supplied)\b"
    r"|\b(?:according to|based on|as (?:stated|mentioned|described|noted|per)(?: in| by)?"
    r"|(?:stated|mentioned|described) in)"
    rf"\s+(?:the|these|this|its|all)\s+(?:{_GIVEN}\s+)*(?:sentences?|descriptions?|captions?|text|list)\b",
    re.IGNORECASE,
)
_COORDINATES = re.compile(
    r"\bbounding[ -]?box(?:es)?\b|\b(?:box|image|pixel|object|x|y|the|its|their|these|given|provided)[ -]coordinates?\b"
    r"|\bcoordinates\s+(?:of|for|in|are|show|suggest|indicate|given|provided)\b",
    re.IGNORECASE,
)
_BOX = re.compile(
    r"[\[(]\s*\d*\.?\d+\s*,\s*\d*\.?\d+\s*,\s*\d*\.?\d+\s*,\s*\d*\.?\d+\s*[\])]"  # four numbers in brackets
    r"|\b[xy][12]\s*="
    r"|(?<![\d.$€£])0\.\d{2,3}(?!\d)\s*(?:,|and|to|-)\s*0\.\d{2,3}(?!\d)"  # shares, side by side
)
_CANNOT = r"(?:can\s?not|can't|won't|am\s+unable|am\s+not\s+able|do\s+not|don't)"
_REFUSAL = re.compile(
    r"^\W*(?:i\s?'?a?m\s+(?:very\s+)?sorry|sorry\b|i\s+apologi[sz]e|unfortunately,?\s+i\b"
    rf"|i\s+{_CANNOT}\s|as\s+an?\s+(?:ai|language|text|visual)\b[^.]*\b{_CANNOT})",
    re.IGNORECASE,
)
_MARKS = re.compile(
    re.escape(IMAGE_MARK) + r"|</?s>|###|\[/?INST\]|<\|im_(?:start|end)\|>|\bASSISTANT:|\bUSER:", re.IGNORECASE
)
_APOSTROPHE = "\u2019"


@dataclass(frozen=True)
class Fault:
    """Attributes: reason: of REASONS; detail: what was found."""

    reason: str
    detail: str = ""


@dataclass
class Verdict:
    """What an answer comes to.

    Attributes:
        turns: what can be learned from, none where the answer is rejected. A detailed description has an empty
            question, to be drawn from the list.
        faults: what was wrong; with turns, only with what came after them.
    """

    turns: list[Turn] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def judge(kind: Kind, reply: Reply) -> Verdict:
    """Take an answer apart and check it.

    Of a conversation the turns before the first faulty one are kept: what comes after may lean on it.
    """
    fault = _whole_fault(reply)
    if fault:
        return Verdict(faults=[fault])
    try:
        turns = [("", parse_description(reply))] if kind.questions == "none" else parse_turns(reply)
    except Unparsable as error:
        return Verdict(faults=[Fault("unparsable", str(error))])
    if kind.questions == "one" and len(turns) != 1:
        return Verdict(faults=[Fault("unparsable", f"{len(turns)} questions where one was asked for")])
    for number, turn in enumerate(turns):
        fault = _turn_fault(turn, [question for question, _ in turns[:number]], kind)
        if fault:
            return Verdict(turns[:number], [fault])
    return Verdict(turns)


def _whole_fault(reply: Reply) -> Fault | None:
    if reply.finish_reason == "content_filter":
        return Fault("refusal", "content filter")
    if not reply.strip():
        return Fault("empty")
    if _declines(reply):
        return Fault("refusal", reply[:80])
    if reply.finish_reason == "length":
        return Fault("cut off", "..." + reply[-40:])
    return None


def _turn_fault(turn: Turn, before: Sequence[str], kind: Kind) -> Fault | None:
    question, answer = turn
    if not answer or (kind.questions != "none" and not question):
        return Fault("empty", "a question without an answer" if question else "an answer without a question")
    if _declines(answer):
        return Fault("refusal", answer[:80])
    text = f"{question}\n{answer}"
    for reason, pattern in (("source", _SOURCE), ("coordinates", _COORDINATES), ("box", _BOX), ("marks", _MARKS)):
        found = pattern.search(text)
        if found:
            return Fault(reason, found[0])
    if question and _plain(question) in map(_plain, before):
        return Fault("repeated", question)
    return None


class Duplicates:
    """Tells a sample that repeats an earlier one: the same of the same picture, or the same long text of another's."""

    LONG = 30  # words; shorter answers may well be true of two pictures

    def __init__(self) -> None:
        self._seen: Counter[int] = Counter()

    def check(self, picture_id: str, turns: Sequence[Turn]) -> Fault | None:
        answers = [_plain(answer) for _, answer in turns]
        keys = [hash((picture_id, tuple(_plain(q) for q, _ in turns), tuple(answers)))]
        keys += [hash(answer) for answer in set(answers) if len(answer.split()) >= self.LONG]
        repeated = any(self._seen[key] for key in keys)
        self._seen.update(keys)
        return Fault("duplicate", turns[0][1][:60]) if repeated else None


def _declines(text: str) -> bool:
    return _REFUSAL.match(text.replace(_APOSTROPHE, "'")) is not None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
