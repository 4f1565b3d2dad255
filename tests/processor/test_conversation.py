"""Conversations against the authors' ids and masks, and the paper's equations 2 and 3."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llava_fast.config import IGNORE, IMAGE_SENTINEL
from llava_fast.errors import ConfigError, LlavaError, SampleError
from llava_fast.processor.conversation import TEMPLATES, EncodedText, encode_conversation, encode_prompt
from llava_fast.processor.tokenizer import Tokenizer
from tests.realdata import real_data

CHATS = [name for name, template in TEMPLATES.items() if not template.drops_question]
STOPS = {"v0": "\n###", "v0_mmtag": "\n###", "llama_2": " </s>", "llava_llama_2": " </s>"}


@pytest.fixture(params=["tiny-legacy", "tiny", "llama-legacy", "llama"])
def tokenizer(request: pytest.FixtureRequest, tiny_model: Path) -> Tokenizer:
    which, _, legacy = request.param.partition("-")
    model = tiny_model if which == "tiny" else real_data("tokenizer", "llama2_tokenizer.model")
    return Tokenizer.load(model, legacy=bool(legacy))


@pytest.fixture
def tiny(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if n % 2 else "human", "value": value} for n, value in enumerate(values)]


def answers(encoded: EncodedText, tokenizer: Tokenizer) -> list[str]:
    """The learned runs of a conversation as text, the space before an answer kept."""
    runs: list[list[int]] = [[]]
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    colon = tokenizer.encode(":", prefix=False)[0]
    return [tokenizer.decode(colon + run, skip_special=False)[1:] for run in runs if run]


def rows(template: str, legacy: bool) -> list[dict[str, Any]]:
    with open(real_data("official_masks", "masks.jsonl"), encoding="utf-8") as lines:
        read = [json.loads(line) for line in lines]
    return [row for row in read if row["template"] == template and row["legacy"] == legacy]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", ["v0", "v1", "llava_llama_2", "plain"])
def test_the_authors_ids_and_labels(template: str, legacy: bool) -> None:
    llama = Tokenizer.load(real_data("tokenizer", "llama2_tokenizer.model"), legacy=legacy)
    known = rows(template, legacy)
    assert len(known) == (10 if template == "plain" else 29)
    for row in known:
        official = encode_conversation(row["conversations"], llama, template, mask="official")
        assert official.input_ids == row["input_ids"], row["name"]
        assert official.labels == row["labels"], row["name"]
        paper = encode_conversation(row["conversations"], llama, template)
        assert paper.input_ids == row["input_ids"], row["name"]
        if template == "v0":  # there the authors learn "###" before every turn and "Assistant:" too
            assert all(ours in (IGNORE, theirs) for ours, theirs in zip(paper.labels, row["labels"], strict=True))
            said = [" " + turn["value"] + "\n###" for turn in row["conversations"][1::2]]
            assert answers(paper, llama) == said
        else:
            assert paper.labels == row["labels"], row["name"]


@pytest.mark.parametrize("answer", ["", "one ASSISTANT: two", "one</s>two"])
def test_the_authors_drop_samples_that_we_learn(answer: str, tiny: Tokenizer) -> None:
    turns = talk("<image>\nwhat is this?", answer)
    assert set(encode_conversation(turns, tiny, "v1", mask="official").labels) == {IGNORE}
    learned = [" " + answer + "</s>" if answer else "</s>"]
    assert answers(encode_conversation(turns, tiny, "v1"), tiny) == learned


def test_official_parses_special_tokens_and_answers_does_not(tiny: Tokenizer) -> None:
    turns = talk("is </s> a <unk> token?", "a cat")
    official = encode_conversation(turns, tiny, "v1", mask="official").input_ids
    ours = encode_conversation(turns, tiny, "v1").input_ids
    assert (official.count(tiny.eos_id), official.count(tiny.special_tokens["<unk>"])) == (2, 1)
    assert (ours.count(tiny.eos_id), ours.count(0), ours.count(1)) == (1, 0, 1)


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize(
    "said",
    [
        ["a cat"],
        [" two cats"],
        ["\ntwo\ncats\n"],
        [""],
        ["h\u00e9 \u4f60\u597d \U0001f600"],
        ["</s>", "### ", "<image>"],
    ],
)
def test_exactly_answers_and_stops_are_learned(template: str, said: list[str], tokenizer: Tokenizer) -> None:
    turns = [turn for n, answer in enumerate(said) for turn in talk(f"what is {n} \U0001f600?", answer)]
    encoded = encode_conversation(turns, tokenizer, template)
    stop = STOPS.get(template, "</s>")
    assert answers(encoded, tokenizer) == [(" " + answer if answer else "") + stop for answer in said]
    assert encoded.input_ids[0] == tokenizer.bos_id and encoded.labels[0] == IGNORE


def test_ten_turns(tokenizer: Tokenizer) -> None:
    turns = [turn for n in range(10) for turn in talk(f"what is {n}?", f"{n} cats")]
    for template in CHATS:
        stop = STOPS.get(template, "</s>")
        assert answers(encode_conversation(turns, tokenizer, template), tokenizer) == [
            f" {n} cats{stop}" for n in range(10)
        ]


def test_plain_is_image_caption_newline(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(talk("what is this?\n<image>", "a cat"), tokenizer, "plain")
    caption = tokenizer.encode("a cat\n", prefix=True)[0]
    assert encoded.input_ids == [tokenizer.bos_id, IMAGE_SENTINEL, *caption]
    assert encoded.labels == [IGNORE, IGNORE, *caption]


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("question", ["<image>\nwhat?", "what?\n<image>", "<image>", "<image>\n<image>\nwhat?"])
def test_a_prompt_is_a_prefix_of_training(template: str, question: str, tokenizer: Tokenizer) -> None:
    pictures = question.count("<image>")
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": n} if line == "<image>" else {"type": "text", "text": line}
        for n, line in enumerate(question.split("\n"))
    ]
    for answer in ("a cat", " a", "\na", "", ":)", "\u4f60"):
        turns = talk(question, "two cats", "and now?", answer)
        whole = encode_conversation(turns, tokenizer, template).input_ids
        first, images = encode_prompt([{"role": "user", "content": parts}], tokenizer, template)
        assert first.input_ids == whole[: len(first.input_ids)] and len(images) == pictures
        assert first.input_ids.count(IMAGE_SENTINEL) == pictures and set(first.labels) == {IGNORE}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "two cats"},
            {"role": "user", "content": "and now?"},
        ]
        second, _ = encode_prompt(messages, tokenizer, template)
        assert second.input_ids == whole[: len(second.input_ids)]
        rest = encode_conversation(turns, tokenizer, template).labels[len(second.input_ids) :]
        learned = [label for label in rest if label != IGNORE]
        tail = 1 if TEMPLATES[template].end else 0  # v0 ends with a space that is not learned
        assert learned == whole[len(second.input_ids) : len(whole) - tail]  # all that follows must be generated


def test_prompts_for_plain(tiny: Tokenizer) -> None:
    message = {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "what?"}]}
    encoded, images = encode_prompt([message], tiny, "plain")
    assert (encoded.input_ids, images) == ([tiny.bos_id, IMAGE_SENTINEL], ["a"])
    with pytest.raises(LlavaError, match="captions images"):
        encode_prompt([{"role": "user", "content": "what?"}], tiny, "plain")


@pytest.mark.parametrize("template", CHATS)
def test_system_message_replaces_the_templates(template: str, tiny: Tokenizer) -> None:
    user = {"role": "user", "content": "what is <image>?"}
    own = TEMPLATES[template].system
    assert own in tiny.decode(encode_prompt([user], tiny, template)[0].input_ids)
    changed, images = encode_prompt([{"role": "system", "content": "Be {system}."}, user], tiny, template)
    text = tiny.decode(changed.input_ids)
    assert own not in text and "Be {system}." in text and "what is <image>?" in text and images == []
    bare = tiny.decode(encode_prompt([{"role": "system", "content": ""}, user], tiny, template)[0].input_ids)
    assert bare.startswith(
        {"v0": "### Human: what", "v1": "USER: what"}.get(template.removeprefix("llava_")[:2], "[INST] what")
    )


def test_equation_2_places_the_first_turns_image(tiny: Tokenizer) -> None:
    def place(written: str, position: str, seed: int = 0) -> str:
        turns = talk(written, "yes", "later <image> here?", "no")
        count = written.count("<image>") + 1
        encoded = encode_conversation(turns, tiny, "v1", image_position=position, rng=Random(seed), num_images=count)
        marked = [tiny.eos_id if i == IMAGE_SENTINEL else i for i in encoded.input_ids]
        return tiny.decode(marked, skip_special=False).split("USER: ", 1)[1]

    drawn = [place("<image>\nwhat is this?", "random", seed) for seed in range(200)]
    assert drawn == [place("what is this?\n<image>", "random", seed) for seed in range(200)]
    before = sum(text.startswith("</s>\nwhat is this? ") for text in drawn)
    after = sum(text.startswith("what is this?\n</s> ASSISTANT") for text in drawn)
    assert before + after == 200 and 70 < before < 130
    assert all("later </s> here?" in text for text in drawn)  # later turns stay as they are
    first = place("what <image>is this?", "first")
    assert first.startswith("</s>\nwhat is this? ") and "</s>\nlater  here?" in first
    assert place("what <image>is this?", "as_written").startswith("what </s>is this?")
    assert place("<image>\nb <image>", "first").startswith("</s>\n</s>\nb ")


def test_marks_are_images_only_where_the_sample_has_images(tiny: Tokenizer) -> None:
    turns = talk("<image>\nwhat?", "an <image> tag")
    assert encode_conversation(turns, tiny, "v1").input_ids.count(IMAGE_SENTINEL) == 1
    assert encode_conversation(turns, tiny, "v1", num_images=1).input_ids.count(IMAGE_SENTINEL) == 1
    assert IMAGE_SENTINEL not in encode_conversation(turns, tiny, "v1", num_images=0).input_ids
    unmarked = encode_conversation(talk("what?", "a"), tiny, "v1", num_images=2)
    assert unmarked == encode_conversation(talk("<image>\n<image>\nwhat?", "a"), tiny, "v1")


def test_mmtag_surrounds_images(tiny: Tokenizer) -> None:
    for mask in ("answers", "official"):
        ids = encode_conversation(talk("<image>\nwhat?", "a"), tiny, "v1_mmtag", mask=mask).input_ids
        place = ids.index(IMAGE_SENTINEL)
        assert tiny.decode(ids[:place]).endswith("USER: <Image>")
        assert tiny.decode(ids[place + 1 :]).startswith("</Image>\nwhat?")


def test_errors_of_samples(tiny: Tokenizer) -> None:
    def fails(match: str, turns: Any, template: str = "v1", **options: Any) -> None:
        with pytest.raises(SampleError, match=match) as caught:
            encode_conversation(turns, tiny, template, sample_id="s7", **options)
        assert caught.value.sample_id == "s7"

    fails("1 <image> marks but 2 images", talk("<image>\nwhat?", "a"), num_images=2)
    fails("2 <image> marks but 1 images", talk("<image> <image>", "a"), num_images=1)
    fails("2 <image> marks but 1 images", talk("<image>", "a <image>"), num_images=1, mask="official")
    fails("turn 0 is from 'gpt'", talk("what?", "a")[1:])
    fails("turn 1 is from 'human'", talk("what?")[:1] * 2)
    fails("turn 1 is from None", [*talk("what?"), {"value": "a"}])
    fails("1 turns do not end with an answer", talk("what?"))
    fails("0 turns", [])
    fails("turn 1 has value None", [*talk("what?"), {"from": "gpt", "value": None}])
    fails("plain.* drops the question.* not 1 without", talk("what?", "a"), "plain")
    fails("plain.* not 2 with;", talk("<image>", "a", "b", "c"), "plain")


def test_errors_of_names(tiny: Tokenizer) -> None:
    turns = talk("what?", "a")
    with pytest.raises(ConfigError, match=r"template='v9' .*plain, v0, v1"):
        encode_conversation(turns, tiny, "v9")
    with pytest.raises(ConfigError, match="mask='all'"):
        encode_conversation(turns, tiny, "v1", mask="all")
    with pytest.raises(ConfigError, match="image_position='last'"):
        encode_conversation(turns, tiny, "v1", image_position="last")
    with pytest.raises(ConfigError, match="needs rng"):
        encode_conversation(turns, tiny, "v1", image_position="random")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "nothing to answer"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "nothing to answer"),
        ([{"role": "system", "content": "a"}], "nothing to answer"),
        ([{"role": "assistant", "content": "a"}], "role 'assistant' where 'user'"),
        ([{"role": "user", "content": "a"}] * 2, "role 'user' where 'assistant'"),
        ([{"role": "user", "content": None}], "NoneType; give text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "'audio'.* not understood"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "not understood"),
        ([{"role": "user", "content": ["a"]}], "not understood"),
        ([{"role": "system", "content": [{"type": "image", "image": "x"}]}], "'system' holds an image"),
    ],
)
def test_errors_of_messages(messages: list[dict[str, Any]], match: str, tiny: Tokenizer) -> None:
    with pytest.raises(LlavaError, match=match):
        encode_prompt(messages, tiny, "v1")


def test_parts_are_joined_with_newlines(tiny: Tokenizer) -> None:
    parts = [{"type": "text", "text": text} for text in ("one", "", "two")]
    joined = encode_prompt([{"role": "user", "content": "one\ntwo"}], tiny, "v1")
    assert encode_prompt([{"role": "user", "content": parts}], tiny, "v1") == joined
