"""When a stream sends what: the answer alone, without a server and without an engine."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest

from llava_fast.engine.handle import Handle
from llava_fast.engine.prompt import Prompt
from llava_fast.engine.text import TextStream
from llava_fast.errors import DeadlineError
from llava_fast.pretrained import built_in
from llava_fast.processor import Tokenizer
from llava_fast.serve.answers import Answer
from llava_fast.serve.forms import ChatForm

TEXT = "red blue green"
FOR_EVER = 3600.0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(built_in())


class Client:
    """Takes what an answer sends."""

    def __init__(
        self, tokenizer: Tokenizer, event_seconds: float, prompts: int = 1, answers: int = 1, reads: bool = True
    ):
        self.handles = [Handle(f"prompt {i}", answers, None) for i in range(prompts)]
        for handle in self.handles:
            texts = [TextStream(tokenizer, (), False) for _ in range(answers)]
            handle._describe(Prompt(np.zeros(1, dtype=np.int64)), texts, scored=False)
        self.bodies: list[bytes] = []
        self.reads = reads
        self.gate = SimpleNamespace(handles=set(), metrics=SimpleNamespace(completed=lambda completion: None))
        self.sent, self.leaves = asyncio.Event(), asyncio.Event()
        self.answer = Answer(
            self.handles,
            ChatForm("tiny", tokenizer, "1", frozenset()),
            stream=True,
            include_usage=False,
            send_seconds=5 if reads else 0.01,
            event_seconds=event_seconds,
            gate=self.gate,
            finished=lambda completions: asyncio.sleep(0),
        )

    async def send(self, message) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            self.sent.set()
            if not self.reads:
                await asyncio.Event().wait()

    async def receive(self):
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def listen(self) -> None:
        scope = {"visit": SimpleNamespace(notes={}, request_id="a")}
        try:
            await self.answer(scope, self.receive, self.send)
        finally:
            assert all(handle.done for handle in self.handles) and not self.gate.handles  # whatever the end

    async def next(self) -> None:
        await asyncio.wait_for(self.sent.wait(), 5)
        self.sent.clear()

    def contents(self, bodies: list[bytes] | None = None) -> list[list[tuple[int, str]]]:
        """By body, the choices' indices and texts."""
        found = []
        for body in self.bodies if bodies is None else bodies:
            events = [event[6:] for event in body.decode().split("\n\n") if event]
            choices = [choice for event in events if event != "[DONE]" for choice in json.loads(event)["choices"]]
            found.append([(c["index"], c["delta"]["content"]) for c in choices if c["delta"].get("content")])
        return found


def test_between_events_tokens_gather_and_the_end_waits_for_nothing(tokenizer):
    ids = tokenizer.encode(TEXT, prefix=False)[0]

    async def run() -> Client:
        client = Client(tokenizer, FOR_EVER)
        listening = asyncio.create_task(client.listen())
        client.handles[0]._publish(0, ids[0], None)
        await client.next()
        for token in ids[1:]:
            client.handles[0]._publish(0, token, "length" if token is ids[-1] else None)
            await asyncio.sleep(0.002)
        assert len(client.bodies) == 1
        client.handles[0]._finish(None)
        await asyncio.wait_for(listening, 5)
        return client

    client = asyncio.run(run())
    first, rest, done = client.contents()
    assert [index for index, _ in first + rest] == [0, 0] and first[0][1] + rest[0][1] == TEXT
    assert done == [] and client.bodies[-1] == b"data: [DONE]\n\n"


def test_after_a_pause_what_has_gathered_is_sent(tokenizer):
    """While the answer goes on, and each token once."""
    ids = tokenizer.encode(TEXT, prefix=False)[0]

    async def run() -> Client:
        client = Client(tokenizer, 0.01)
        listening = asyncio.create_task(client.listen())
        for token in ids[:-1]:
            client.handles[0]._publish(0, token, None)
            await client.next()
        client.handles[0]._publish(0, ids[-1], "length")
        client.handles[0]._finish(None)
        await asyncio.wait_for(listening, 5)
        return client

    contents = asyncio.run(run()).contents()
    assert len(contents) == len(ids) + 1 >= 4 and "".join(text for body in contents for _, text in body) == TEXT


@pytest.mark.parametrize(
    ("asked", "requests", "seconds"),
    [(0.02, 1, 0.02), (0.02, 8, 0.02), (0.02, 32, 0.08), (0.02, 1000, 0.1), (0.5, 1, 0.5), (0.5, 1000, 0.5)],
)
def test_many_requests_have_longer_pauses_up_to_a_tenth_of_a_second(tokenizer, asked, requests, seconds):
    client = Client(tokenizer, asked)
    client.gate.handles.update(range(requests))
    assert client.answer._pause() == pytest.approx(seconds)


@pytest.mark.parametrize("prompts", [1, 2])
def test_errors_in_a_pause_are_told_at_once(tokenizer, prompts):
    """After what had gathered; the other prompt is given up."""
    ids = tokenizer.encode(TEXT, prefix=False)[0]

    async def run() -> Client:
        client = Client(tokenizer, FOR_EVER, prompts)
        listening = asyncio.create_task(client.listen())
        client.handles[0]._publish(0, ids[0], None)
        await client.next()
        for token in ids[1:]:
            client.handles[0]._publish(0, token, None)
        client.handles[0]._finish(DeadlineError("too late"))
        await asyncio.wait_for(listening, 5)
        return client

    client = asyncio.run(run())
    *told, last = client.bodies
    assert "".join(text for body in client.contents(told) for _, text in body) == TEXT
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"


def test_a_client_that_leaves_in_a_pause_ends_its_request(tokenizer):
    token = tokenizer.encode("red", prefix=False)[0][0]

    async def run() -> Client:
        client = Client(tokenizer, FOR_EVER)
        listening = asyncio.create_task(client.listen())
        client.handles[0]._publish(0, token, None)
        await client.next()
        client.leaves.set()
        await asyncio.wait_for(listening, 5)
        return client

    assert len(asyncio.run(run()).bodies) == 1


def test_a_client_that_reads_nothing_ends_its_request(tokenizer):
    token = tokenizer.encode("red", prefix=False)[0][0]

    async def run() -> Client:
        client = Client(tokenizer, 0, reads=False)
        client.handles[0]._publish(0, token, None)
        with pytest.raises(ConnectionError, match="does not read"):
            await asyncio.wait_for(client.listen(), 5)
        return client

    assert len(asyncio.run(run()).bodies) == 1


def test_without_a_pause_each_token_is_an_event(tokenizer):
    ids = tokenizer.encode("red", prefix=False)[0]

    async def run() -> Client:
        client = Client(tokenizer, 0)
        listening = asyncio.create_task(client.listen())
        for place, token in enumerate(ids):
            client.handles[0]._publish(0, token, "length" if place == len(ids) - 1 else None)
            await client.next()
        client.handles[0]._finish(None)
        await asyncio.wait_for(listening, 5)
        return client

    contents = asyncio.run(run()).contents()
    assert len(contents) == len(ids) + 1 and "".join(text for body in contents for _, text in body) == "red"


@pytest.mark.parametrize("prompts", [1, 2])
def test_several_answers_share_a_body(tokenizer, prompts):
    """Both answers of a prompt at once, each whole; of two prompts each for itself."""
    ids = tokenizer.encode(TEXT, prefix=False)[0]

    async def run() -> Client:
        client = Client(tokenizer, FOR_EVER, prompts, answers=2)
        for handle in client.handles:
            for place, token in enumerate(ids):
                for index in (0, 1):
                    handle._publish(index, token, "length" if place == len(ids) - 1 else None)
            handle._finish(None)
        await asyncio.wait_for(client.listen(), 5)
        return client

    contents = asyncio.run(run()).contents()
    assert contents == [*([(2 * p, TEXT), (2 * p + 1, TEXT)] for p in range(prompts)), []]
