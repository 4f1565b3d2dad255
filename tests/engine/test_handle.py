"""Deltas taken together say what they said one by one."""

from __future__ import annotations

from llava_fast.engine import Delta, Output, TokenLogprob
from llava_fast.engine.handle import Handle
from llava_fast.engine.request import joined

NEWS = [
    Delta("one", (1,), index=1, logprobs=(TokenLogprob(1, -0.5),)),
    Delta("", (2,), index=0, logprobs=(TokenLogprob(2, -0.1),)),
    Delta(" two", (3,), index=1, logprobs=(TokenLogprob(3, -0.2),)),
    Delta(" end", (4, 5), "stop", index=0, logprobs=(TokenLogprob(4, -0.3), TokenLogprob(5, -0.4))),
    Delta("", (), "length", index=1),
]


def added(deltas):
    outputs = [Output(0), Output(1)]
    for delta in deltas:
        outputs[delta.index].add(delta)
    return outputs


def test_joined_deltas_add_up_to_the_same():
    together = joined(NEWS)
    assert sorted(delta.index for delta in together) == [0, 1]
    assert added(together) == added(NEWS)
    assert joined(NEWS[:2]) == NEWS[:2]


def test_take_gives_what_is_there_once_and_waits_for_nothing():
    handle = Handle("a", 2, None)
    assert handle.take() == []
    for delta in NEWS:
        handle._publish(delta)
    iterator = iter(handle)
    assert next(iterator) == NEWS[0]
    assert handle.take() == NEWS[1:]
    assert handle.take() == []
    handle._finish(None)
    assert list(iterator) == []
