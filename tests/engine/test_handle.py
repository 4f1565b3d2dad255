"""What a handle gives its reader: each delta all that is new, and together the whole answer."""

from __future__ import annotations

import asyncio
from threading import Thread

import numpy as np
import pytest

from llava_fast.engine import Delta, TokenLogprob
from llava_fast.engine.handle import Handle
from llava_fast.engine.prompt import Prompt
from llava_fast.engine.text import TextStream
from llava_fast.errors import CancelledError
from llava_fast.pretrained import built_in
from llava_fast.processor import Tokenizer

TEXT = "The red circle is left of the blue square 😀!"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(built_in())


def made(tokenizer: Tokenizer, n: int = 1, stops: tuple[str, ...] = ()) -> Handle:
    handle = Handle("a", n, None)
    texts = [TextStream(tokenizer, stops, False) for _ in range(n)]
    handle._describe(Prompt(np.zeros(1, dtype=np.int64)), texts, scored=False)
    return handle


def joined(deltas: list[Delta], index: int) -> Delta:
    mine = [delta for delta in deltas if delta.index == index]
    return Delta(
        "".join(delta.text for delta in mine),
        tuple(token for delta in mine for token in delta.token_ids),
        mine[-1].finish_reason,
        index,
        tuple(score for delta in mine for score in delta.logprobs),
    )


@pytest.mark.parametrize("every", [1, 2, 7, 1000])
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_deltas_add_up_to_the_answer_however_often_they_are_read(tokenizer, every, reason):
    """Two answers at once, read after every so many tokens; the second a token behind the first."""
    ids = tokenizer.encode(TEXT, prefix=False)[0] + [tokenizer.eos_id] * (reason == "stop")
    handle, found = made(tokenizer, n=2), list[Delta]()
    for place, token in enumerate(ids):
        for index in (0, 1):
            last = reason if place == len(ids) - 1 else None
            handle._publish(index, token, last, score=TokenLogprob(token, -float(place)) if index else None)
        if not place % every:
            found += handle.take()
    handle._finish(None)
    found += handle.take()
    whole = tokenizer.decode(ids)
    for index, output in enumerate(handle.result().outputs):
        scores = tuple(TokenLogprob(token, -float(place)) for place, token in enumerate(ids)) if index else ()
        assert joined(found, index) == Delta(whole, tuple(ids), reason, index, scores)
        assert (output.text, output.token_ids, output.finish_reason) == (whole, ids, reason)
    assert len(found) == 2 * len(range(0, len(ids), every)) + (2 if (len(ids) - 1) % every else 0)


def test_text_that_the_engine_had_to_look_at_is_taken_as_it_is(tokenizer):
    handle = made(tokenizer, stops=("###",))
    handle._publish(0, 5, None, "one")
    assert handle.take() == [Delta("one", (5,))]
    handle._publish(0, 6, None, " two")
    handle._publish(0, 7, "stop", " end")
    handle._finish(None)
    assert handle.take() == [Delta(" two end", (6, 7), "stop")]
    assert handle.result().text == "one two end"


def test_take_waits_for_nothing_and_gives_nothing_twice(tokenizer):
    handle = made(tokenizer, n=2)
    assert handle.take() == []
    ids = tokenizer.encode("red blue", prefix=False)[0]
    for token in ids:
        handle._publish(0, token, None)
        handle._publish(1, token, None)
    iterator = iter(handle)
    assert next(iterator).index == 0
    assert [delta.index for delta in handle.take()] == [1]
    assert handle.take() == []
    handle._finish(None)
    assert list(iterator) == []


def test_half_a_character_is_held_back_until_the_end(tokenizer):
    """Three of the four bytes of an emoji, then nothing more."""
    ids = tokenizer.encode("a😀", prefix=False)[0]
    assert len(ids) >= 5
    handle = made(tokenizer)
    for token in ids[:-1]:
        handle._publish(0, token, None)
    assert joined(handle.take(), 0).text == "a"
    handle._publish(0, tokenizer.eos_id, "stop")
    rest = joined(handle.take(), 0)
    assert set(rest.text) == {"\ufffd"} and rest.token_ids == (tokenizer.eos_id,)
    handle._finish(None)
    assert handle.result().text == "a" + rest.text  # not twice


def test_what_came_before_a_cancellation_can_be_read(tokenizer):
    handle = made(tokenizer)
    ids = tokenizer.encode("red", prefix=False)[0]
    for token in ids:
        handle._publish(0, token, None)
    handle.cancel()
    handle._publish(0, 9, None)
    iterator = iter(handle)
    assert next(iterator) == Delta("red", tuple(ids))
    with pytest.raises(CancelledError):
        next(iterator)
    assert handle._completion.text == "red"


def test_a_reader_on_a_loop_is_woken(tokenizer):
    handle = made(tokenizer)

    async def read() -> list[Delta]:
        return [delta async for delta in handle]

    async def both() -> list[Delta]:
        reading = asyncio.create_task(read())
        for token in tokenizer.encode("red", prefix=False)[0]:
            await asyncio.sleep(0)
            handle._publish(0, token, None)
        handle._finish(None)
        return await reading

    assert joined(asyncio.run(both()), 0).text == "red"


def test_who_waits_for_the_end_is_not_woken_by_tokens(tokenizer, monkeypatch):
    """A thread and a task: being woken takes the interpreter from the thread that makes the tokens."""
    handle, waits = made(tokenizer), []
    wait = handle._ended.wait
    monkeypatch.setattr(handle._ended, "wait", lambda seconds: (waits.append(seconds), wait(seconds)))
    thread = Thread(target=handle.result)
    thread.start()

    async def main() -> None:
        async def end():
            return await handle

        ending = asyncio.create_task(end())
        while not (waits and handle._waiting_for_end):
            await asyncio.sleep(0.001)
        ((_, event),) = handle._waiting_for_end
        for token in tokenizer.encode("red", prefix=False)[0]:
            handle._publish(0, token, None)
        await asyncio.sleep(0.02)
        assert not event.is_set() and len(waits) == 1 and thread.is_alive()
        handle._finish(None)
        assert (await ending).text == "red"

    asyncio.run(main())
    thread.join(10)
    assert not thread.is_alive()


def test_who_reads_more_slowly_than_the_engine_writes_can_be_cancelled(tokenizer):
    """There is always news for such a reader; the loop has its turns all the same."""
    handle, read = made(tokenizer), []
    handle._publish(0, 5, None)

    async def slow() -> None:
        async for delta in handle:
            handle._publish(0, 5, None)
            read.append(delta)
            assert len(read) < 1000, "nothing else had a turn"

    async def main() -> None:
        reading = asyncio.create_task(slow())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(main())
    assert read
