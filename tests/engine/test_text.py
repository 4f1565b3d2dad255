"""Text as it streams against the tokenizer's text of the whole list, for any tokens in any order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.engine.text import TextStream
from llava_fast.processor import Tokenizer

SETTINGS = settings(max_examples=400, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:
    return Tokenizer.load(tiny_model)


@pytest.fixture(scope="module")
def kinds(tokenizer) -> list[list[int]]:
    """Runs of tokens to make lists of: words, spaces, characters in bytes, bytes alone, special and unknown ids."""

    def of_bytes(some: bytes) -> list[int]:
        return [tokenizer.token_id(f"<0x{byte:02X}>") for byte in some]

    characters = [of_bytes(c.encode()) for c in ("é", "€", "😀", "👩‍🚀", "\ufffd", "\n")]
    lone = [of_bytes(bytes([byte])) for byte in (0x41, 0x80, 0x9F, 0xC3, 0xE2, 0xF0, 0xFF)]
    words = [tokenizer.encode(text, prefix=False)[0] for text in ("a cat", " two cats", " ", "  ", "?!", "USER:")]
    return [*characters, *lone, *words, [tokenizer.bos_id], [tokenizer.eos_id], [tokenizer.unk_id], [419], [300], [350]]


def drawn(kinds: list[list[int]], picks: list[tuple[int, int]]) -> list[int]:
    """The runs that ``picks`` names, some of them cut short."""
    ids = []
    for pick, length in picks:
        ids += kinds[pick % len(kinds)][:length]
    return ids


PICKS = st.lists(st.tuples(st.integers(0, 21), st.sampled_from([20, 20, 3, 2, 1])), max_size=14)


@SETTINGS
@given(picks=PICKS)
def test_what_is_streamed_adds_up_to_the_whole(tokenizer, kinds, picks):
    ids, stream, text = drawn(kinds, picks), TextStream(tokenizer, (), False), ""
    for count, token in enumerate(ids, 1):
        new, stopped = stream.push(token)
        text += new
        whole = tokenizer.decode(ids[:count])
        assert not stopped and whole.startswith(text)
        assert set(whole[len(text) :]) <= {"\ufffd"} and len(whole) - len(text) <= 3  # nothing else is held back
    assert text + stream.finish() == tokenizer.decode(ids)


STOPS = st.lists(st.sampled_from(["at", "a cat", "s USER", "é", "😀?", "  ", "aa", "not there", "\n"]), max_size=3)


@SETTINGS
@given(picks=PICKS, stops=STOPS, include=st.booleans(), least=st.sampled_from([0, 0, 0, 5]))
def test_the_text_ends_at_the_first_stop_and_no_part_of_it_is_shown(tokenizer, kinds, picks, stops, include, least):
    """The stop texts are looked for in all that the tokens say until then, by brute force."""
    ids, stream, text = drawn(kinds, picks), TextStream(tokenizer, stops, include), ""
    passed = 0  # up to here the text had come before it could stop
    for count, token in enumerate(ids, 1):
        new, stopped = stream.push(token, may_stop=count >= least)
        text += new
        whole = tokenizer.decode(ids[:count])
        if count < least:
            passed = len(text)
        found = [(whole.find(stop, passed), stop) for stop in stops if stop in whole[passed:]]
        assert stopped == bool(found and count >= least)
        if stopped:
            first = min(at for at, _ in found)
            assert text in {whole[: at + len(stop) * include] for at, stop in found if at == first}
            return
        assert whole.startswith(text)
        if count >= least:
            assert not any(text[passed:].endswith(stop[:n]) for stop in stops for n in range(1, len(stop)))
    assert text + stream.finish() == tokenizer.decode(ids)


def test_a_character_in_four_tokens_comes_whole(tokenizer):
    stream = TextStream(tokenizer, (), False)
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    assert [stream.push(token)[0] for token in ids] == ["", "", "", "😀"]


def test_what_looked_like_a_stop_is_shown_once_it_is_none(tokenizer):
    stream = TextStream(tokenizer, ("###",), False)
    ids = [tokenizer.token_id(f"<0x{ord(c):02X}>") for c in "a##b###c"]
    pushed = [stream.push(token) for token in ids[:7]]
    assert [text for text, _ in pushed] == ["a", "", "", "##b", "", "", ""]
    assert [stopped for _, stopped in pushed] == [False] * 6 + [True]


def test_an_answer_that_ends_within_a_character_or_a_stop_gives_what_there_is(tokenizer):
    for text, held in (("ab#", "#"), ("ab😀", "")):
        stream = TextStream(tokenizer, ("##",), False)
        ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in text.encode()]
        shown = "".join(stream.push(token)[0] for token in ids)
        assert shown == text[: len(text) - len(held)] and stream.finish() == held
    stream = TextStream(tokenizer, (), False)
    assert [stream.push(token)[0] for token in ids[:4]] == ["a", "b", "", ""]
    assert stream.finish() == tokenizer.decode(ids[:4])[2:] != ""
