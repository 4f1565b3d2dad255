"""Answers taken apart and checked."""

from __future__ import annotations

import json

import pytest

from llava_fast.datagen.checks import Duplicates, judge
from llava_fast.datagen.kinds import KINDS
from llava_fast.datagen.prompting import read_prompts
from llava_fast.teacher import Reply
from tests.realdata import real_data

CONVERSATION, DETAIL, REASONING = KINDS.values()


def talk(*turns):
    return Reply("\n===\n".join(f"Question:\n{q}\n===\nAnswer:\n{a}" for q, a in turns))


def reasons(kind, reply):
    return [fault.reason for fault in judge(kind, reply).faults]


def test_turns():
    turns = [("Who?", "A man.\n\n1. tall\n2. old, near a == sign"), ("Where?", "At sea.")]
    assert judge(CONVERSATION, talk(*turns)).turns == turns
    loose = "\n===\nQuestion: Who?\n====\n**Answer:** A man.\n\n=== \n question:\nWhere?\n===\nAnswer:At sea.\n===\n"
    assert judge(CONVERSATION, Reply(loose)).turns == [("Who?", "A man."), ("Where?", "At sea.")]
    assert judge(DETAIL, Reply(" One.\n\nTwo. ")).turns == [("", "One.\n\nTwo.")]


@pytest.mark.parametrize(
    "text",
    [
        "Just text.",
        "Question:\nWho?\nAnswer:\nA man.",
        "Question:\nWho?\n===\nAnswer:\nA man.\n===\nQuestion:\nWhere?",
        "Answer:\nA man.\n===\nQuestion:\nWho?",
        "Here you are.\n===\nQuestion:\nWho?\n===\nAnswer:\nA man.",
    ],
)
def test_unparsable(text):
    assert reasons(CONVERSATION, Reply(text)) == ["unparsable"] and not judge(CONVERSATION, Reply(text)).turns


def test_kinds_have_their_forms():
    assert reasons(REASONING, talk(("Why?", "So."), ("How?", "Thus."))) == ["unparsable"]
    assert reasons(DETAIL, talk(("Why?", "So."))) == ["unparsable"]
    assert reasons(DETAIL, Reply("  \n")) == ["empty"]
    assert reasons(REASONING, talk(("Why?", ""))) == ["empty"]
    assert reasons(DETAIL, Reply("A man stands at", "length")) == ["cut off"]
    assert reasons(DETAIL, Reply("", "content_filter")) == ["refusal"]


BAD = {
    "source": [
        "According to the captions, a man stands there.",
        "The caption mentions two dogs.",
        "The provided descriptions say that it is a bus.",
        "It is red, as stated in the given sentences.",
        "None of the captions says so.",
        "Based on the description, he is old.",
        "From the information provided, it is a market.",
    ],
    "coordinates": [
        "The bounding box of the dog is small.",
        "Its bounding boxes overlap.",
        "The coordinates of the cup suggest that it is left.",
        "The dog's x-coordinate is small.",
    ],
    "box": [
        "The dog is at [0.12, 0.3, 0.4, 0.555].",
        "The dog (0.1, 0.2, 0.3, 0.4) sits.",
        "x1 = 0.3",
        "It goes from 0.125 to 0.384.",
    ],
    "marks": ["See <image> here.", "Yes.</s>", "### Human: hello", "A USER: x"],
    "refusal": [
        "I'm sorry, but I can't help with that.",
        "I cannot see the picture.",
        "As an AI language model, I am unable to see pictures.",
        "I\u2019m sorry, there is nothing.",
        "Sorry, I can't.",
    ],
}
GOOD = [
    "The newspaper's headline reads 'Caption of the year' in bold.",
    "A coach coordinates the players and their moves.",
    "It costs $0.25 to $0.75 and weighs 0.5 kg.",
    "The chess board has 8, 16 or 32 pieces (1, 2, 3).",
    "The man is sorry that he cannot come.",
    "A box of books stands at the left, with a description of its contents on a label.",
    "I think so: it is a bus.",
    "The user of the laptop has left.",
]


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in BAD.items() for text in texts])
def test_what_must_not_be_said(reason, text):
    assert reasons(DETAIL, Reply(text)) == [reason]
    assert reasons(REASONING, talk(("Why?", text))) == [reason]


@pytest.mark.parametrize("text", GOOD)
def test_what_may_be_said(text):
    assert reasons(DETAIL, Reply(text)) == []


def test_turns_before_a_fault_are_kept():
    good = ("Who?", "A man.")
    verdict = judge(CONVERSATION, talk(good, ("Where?", "As the captions say, at sea."), ("And?", "Nothing.")))
    assert verdict.turns == [good] and [fault.reason for fault in verdict.faults] == ["source"]
    assert reasons(CONVERSATION, talk(good, ("who ?", "A man."))) == ["repeated"]
    assert judge(CONVERSATION, talk(("Who?", ""), good)).turns == []


def test_duplicates():
    long = " ".join(f"word{n}" for n in range(40))
    duplicates = Duplicates()
    assert duplicates.check("a", [("q", "Short.")]) is None
    assert duplicates.check("b", [("q", "Short.")]) is None  # may be true of both
    assert duplicates.check("a", [("Q?", "short")]).reason == "duplicate"
    assert duplicates.check("a", [("q", long)]) is None
    assert duplicates.check("b", [("other", long.upper())]).reason == "duplicate"


def test_the_examples_in_the_prompts_pass():
    prompts = read_prompts()
    for kind in KINDS.values():
        assert len(prompts.shots[kind.name]) >= 2
        for context, answer in prompts.shots[kind.name]:
            verdict = judge(kind, Reply(answer))
            assert verdict.turns and not verdict.faults
            assert ("]" in context) == kind.boxes


def test_real_generations_pass():
    """Nothing in 180 real GPT-4 answers is taken for a fault."""
    folder = real_data("llava_bench_coco")
    kinds = {"conv": REASONING, "detail": DETAIL, "complex": REASONING}  # each conv row is one question
    rows = [json.loads(line) for line in (folder / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()]
    texts = [(row["type"], row["output"]) for row in rows]
    more = [json.loads(line) for line in (folder / "qa90_gpt4_answer.jsonl").read_text().splitlines()]
    texts += [(row["category"], row["text"]) for row in more]
    assert len(texts) == 180
    for name, text in texts:
        assert reasons(kinds[name], Reply(text) if name == "detail" else talk(("Why?", text))) == []
