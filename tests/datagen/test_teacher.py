"""The client of a served teacher, and its file of replies."""

from __future__ import annotations

import asyncio
import errno
import json

import pytest

from llava_fast.errors import ConfigError
from llava_fast.teacher import OpenAITeacher, ReplyFile, TeacherError, TeacherUnusableError

HELLO = [{"role": "user", "content": "hello"}]


def ask(server, *asked, **options):
    """What a teacher replies to messages asked at once, and its usage."""

    async def run():
        async with OpenAITeacher(server.url, "fake", **{"pause": 0.01, "timeout": 30, **options}) as teacher:
            texts = [teacher.ask(m, max_tokens=8, temperature=0.5, **more) for m, more in asked]
            return await asyncio.gather(*texts, return_exceptions=True), teacher.usage

    return asyncio.run(run())


@pytest.fixture
def replies(tmp_path):
    file = ReplyFile(tmp_path / "replies.jsonl")
    yield file
    file.close()


def test_asks_once_and_counts(serve, replies):
    server = serve(answer=lambda m: m[-1]["content"].upper(), delay=0.05)
    other = [{"role": "user", "content": "h\u00e4?\n"}]
    asked = [(HELLO, {}), (HELLO, {}), (HELLO, {"draw": 1}), (other, {})]
    (first, second, drawn, third), usage = ask(server, *asked, replies=replies, price=(1e4, 1e5))
    assert (first, second, drawn, third) == ("HELLO", "HELLO", "HELLO", "H\u00c4?\n")
    assert first.finish_reason == "stop"
    assert (usage.replies, usage.from_file, usage.prompt_tokens, usage.answer_tokens) == (3, 1, 300, 30)
    assert usage.dollars == pytest.approx(300 * 0.01 + 30 * 0.1) and len(server.log) == 3
    again, usage = ask(server, *asked, replies=replies)
    assert again == [first, second, drawn, third] and usage.replies == 0 and len(server.log) == 3
    ask(server, (HELLO, {}))  # without a file nothing is kept
    assert len(server.log) == 4


def test_a_refused_key_is_final_and_a_refused_request_its_own(serve):
    ((error,), usage) = ask(serve(lambda _: ["401"]), (HELLO, {}))
    assert type(error) is TeacherUnusableError and usage.retries == 0
    ((error,), usage) = ask(serve(lambda _: ["400"]), (HELLO, {}))
    assert type(error) is TeacherError and "told to answer 400" in str(error) and usage.retries == 0
    ((error,), usage) = ask(serve(lambda _: ["500"]), (HELLO, {}), tries=3)
    assert type(error) is TeacherError and "no answer in 3 tries" in str(error) and usage.retries == 2


def test_a_rate_limit_is_waited_for(serve, monkeypatch):
    """After a 429 everybody waits at least as long as the server asks for (its Retry-After is 0.05 s)."""
    pauses, sleep = [], asyncio.sleep

    async def note(seconds, *more):
        pauses.append(seconds)
        await sleep(seconds, *more)

    monkeypatch.setattr(asyncio, "sleep", note)
    served = []
    server = serve(lambda _: served.append(1) or (["429"] if len(served) == 1 else ["good"]), answer=str)
    asked = [([{"role": "user", "content": str(n)}], {}) for n in range(4)]
    answers, usage = ask(server, *asked, at_once=1)
    assert len(answers) == 4 and usage.retries == 1 and pauses and pauses[0] >= 0.05


def test_requests_at_once(serve):
    server = serve(answer=str, delay=0.02)
    ask(server, *[([{"role": "user", "content": str(n)}], {}) for n in range(20)], at_once=3)
    assert server.most_at_once == 3 and server.done("good") == 20


def test_requests_a_minute(monkeypatch):
    """Ten who ask at once begin three seconds apart at twenty a minute, on a clock of the test's own."""
    now, begun = [100.0], []

    async def sleep(seconds):
        until = now[0] + seconds
        now[0] = max(now[0], until)

    async def run():
        async with OpenAITeacher("http://127.0.0.1:1/v1", "fake", per_minute=20) as teacher:
            for _ in range(10):
                await teacher._wait_for_turn()
                begun.append(now[0])

    monkeypatch.setattr("llava_fast.teacher.time.monotonic", lambda: now[0])
    monkeypatch.setattr("llava_fast.teacher.asyncio.sleep", sleep)
    asyncio.run(run())
    assert begun == pytest.approx([100 + 3 * n for n in range(10)])


def test_no_key_reaches_the_file(serve, replies):
    ask(serve(answer=lambda m: "x"), (HELLO, {}), replies=replies, api_key="secret-key")
    assert "secret-key" not in replies.path.read_text()


def test_file_takes_one_writer(replies):
    with pytest.raises(ConfigError, match="another process is writing"):
        ReplyFile(replies.path)


def test_file_survives_what_a_kill_leaves(replies):
    for n in range(5):
        replies.put(f"k{n}", {"text": "t\n\u00e4" * n})
    replies.close()
    whole = replies.path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        replies.path.write_bytes(whole[:cut])
        file = ReplyFile(replies.path)
        kept = sum(end <= cut for end in ends)
        assert len(file) == kept and all(file.get(f"k{n}")["text"] == "t\n\u00e4" * n for n in range(kept))
        file.put("new", {"text": "x"})
        file.close()
        assert [json.loads(line)["key"] for line in replies.path.read_text().splitlines()][-1] == "new"


def test_full_disk_leaves_the_file_whole(replies, monkeypatch):
    replies.put("a", {"text": "x"})
    before, write = replies.path.read_bytes(), replies._file.write

    class Full:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, line):
            write(line[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

    file = replies._file
    monkeypatch.setattr(replies, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        replies.put("b", {"text": "y"})
    assert replies.path.read_bytes() == before and replies.get("b") is None


def test_what_is_no_file_of_replies(tmp_path):
    (tmp_path / "a").write_text('{"key": "k", "text": "x"}\nhello\n{"key": "l"}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .* is no reply"):
        ReplyFile(tmp_path / "a")
    assert (tmp_path / "a").read_text().count("\n") == 3
    with pytest.raises(ConfigError, match="choose a place that can be written"):
        ReplyFile(tmp_path / "a" / "b")
