"""What goes wrong in one request stays with it: a typed error, everything freed, every other answer still right."""

from __future__ import annotations

import struct
import threading
import time
import weakref
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

import llava_fast as lf
from llava_fast.engine.images import ImageReader
from llava_fast.errors import (
    CancelledError,
    DeadlineError,
    EngineClosedError,
    ImageError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    StepError,
)
from tests.engine.conftest import IMAGE, VOCAB, picture, prompt, question

POISON = 17  # a prompt that begins with this id cannot be computed
WAIT = 60  # seconds; no test waits so long unless it fails


def png(width: int, height: int) -> bytes:
    """A PNG file of that size by its header, with no more than a few bytes of pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\x80" * 3 * min(width, 8)) * min(height, 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def good_requests() -> list[lf.Request]:
    rng = np.random.default_rng(5)
    made = []
    for number in range(6):
        images = [picture(rng, 30 + number)] * (number % 3)
        sampling = lf.SamplingParams(max_tokens=2 + number % 4)
        made.append(lf.Request(token_ids=prompt(rng, 6 + 5 * number, len(images)), images=images, sampling=sampling))
    return made


@pytest.fixture(scope="module")
def good(pair) -> list[tuple[lf.Request, list[int]]]:
    return [(request, pair.reference(request)) for request in good_requests()]


def assert_right(engine: lf.Engine, good) -> None:
    done = engine.generate([request for request, _ in good])
    assert [c.token_ids for c in done] == [tokens for _, tokens in good]


def assert_idle(engine: lf.Engine) -> None:
    """Nothing waits, runs or is held."""
    stats = engine.stats()
    assert stats.waiting == stats.running == stats.blocks_held == 0
    assert not engine._jobs and not engine._launched and not engine._scheduler.waiting
    assert len(engine._scheduler._slots) == engine.config.max_sequences


def ask(image=None, text: str = "what", **settings) -> lf.Request:
    return lf.Request(messages=question(text, image), sampling=lf.SamplingParams(**{"max_tokens": 3, **settings}))


def of_ids(length: int, first: int = 1, **settings) -> lf.Request:
    return lf.Request(token_ids=[first] + [9] * (length - 1), sampling=lf.SamplingParams(ignore_eos=True, **settings))


def turns(*roles: str) -> list[dict]:
    return [{"role": role, "content": "a"} for role in roles]


def part(**fields) -> list[dict]:
    return [{"role": "user", "content": [fields]}]


TINY = np.zeros((2, 2, 3), dtype=np.uint8)
BAD = {
    "no image at all": (lambda: ask(b"nothing"), ImageError),
    "empty image": (lambda: ask(b""), ImageError),
    "truncated image": (lambda: ask(png(28, 28)), ImageError),
    "30,000 x 30,000 header": (lambda: ask(png(30_000, 30_000)), ImageError),
    "missing file": (lambda: ask("/nowhere/picture.png"), ImageError),
    "image of another kind": (lambda: ask(3.5), ImageError),
    "array without pixels": (lambda: ask(np.zeros((0, 4, 3), np.uint8)), ImageError),
    "one bad image of two": (
        lambda: lf.Request(token_ids=[1, IMAGE, 9, IMAGE], images=[TINY, b"x"], sampling=lf.SamplingParams()),
        ImageError,
    ),
    "prompt too long": (lambda: of_ids(600), PromptTooLongError),
    "text too long": (lambda: ask(text="cat " * 3000), PromptTooLongError),
    "images too long": (
        lambda: lf.Request(token_ids=[IMAGE] * 40, images=[TINY] * 40),
        PromptTooLongError,
    ),
    "huge n": (lambda: ask(n=10**15), InvalidRequestError),
    "n over max_n": (lambda: ask(n=9), InvalidRequestError),
    "id above the vocabulary": (lambda: lf.Request(token_ids=[1, VOCAB]), InvalidRequestError),
    "id below 0": (lambda: lf.Request(token_ids=[1, -7]), InvalidRequestError),
    "id beyond 64 bits": (lambda: lf.Request(token_ids=[1, 1 << 70]), InvalidRequestError),
    "ids that are texts": (lambda: lf.Request(token_ids=["a"]), InvalidRequestError),
    "ids that are no list": (lambda: lf.Request(token_ids=5), InvalidRequestError),
    "no ids": (lambda: lf.Request(token_ids=[]), InvalidRequestError),
    "more image ids than images": (lambda: lf.Request(token_ids=[1, IMAGE]), InvalidRequestError),
    "more images than image ids": (lambda: lf.Request(token_ids=[1], images=[TINY]), InvalidRequestError),
    "images beside messages": (lambda: lf.Request(messages=question(), images=[TINY]), InvalidRequestError),
    "too many images": (lambda: lf.Request(token_ids=[IMAGE] * 65, images=[TINY] * 65), InvalidRequestError),
    "too many images in messages": (
        lambda: lf.Request(messages=[{"role": "user", "content": [{"type": "image", "image": TINY}] * 65}]),
        InvalidRequestError,
    ),
    "neither messages nor ids": (lambda: lf.Request(), InvalidRequestError),
    "messages and ids": (lambda: lf.Request(messages=question(), token_ids=[1]), InvalidRequestError),
    "no messages": (lambda: lf.Request(messages=[]), InvalidRequestError),
    "messages are a text": (lambda: lf.Request(messages="hello"), InvalidRequestError),
    "messages are a number": (lambda: lf.Request(messages=3), InvalidRequestError),
    "a message is a text": (lambda: lf.Request(messages=["hello"]), InvalidRequestError),
    "no role": (lambda: lf.Request(messages=[{"content": "a"}]), InvalidRequestError),
    "unknown role": (lambda: lf.Request(messages=turns("robot")), InvalidRequestError),
    "user twice": (lambda: lf.Request(messages=turns("user", "user")), InvalidRequestError),
    "assistant first": (lambda: lf.Request(messages=turns("assistant", "user")), InvalidRequestError),
    "assistant last": (lambda: lf.Request(messages=turns("user", "assistant")), InvalidRequestError),
    "system alone": (lambda: lf.Request(messages=turns("system")), InvalidRequestError),
    "no content": (lambda: lf.Request(messages=[{"role": "user"}]), InvalidRequestError),
    "content is a number": (lambda: lf.Request(messages=[{"role": "user", "content": 5}]), InvalidRequestError),
    "half a surrogate pair": (lambda: ask(text="a\ud800"), InvalidRequestError),
    "unknown part": (lambda: lf.Request(messages=part(type="video", video="a")), InvalidRequestError),
    "part without its text": (lambda: lf.Request(messages=part(type="text")), InvalidRequestError),
    "part without its image": (lambda: lf.Request(messages=part(type="image")), InvalidRequestError),
    "bias outside the vocabulary": (lambda: ask(logit_bias={10**9: 1.0}), InvalidRequestError),
    "stop id outside the vocabulary": (lambda: ask(stop_token_ids=(VOCAB,)), InvalidRequestError),
    "cannot be computed": (lambda: of_ids(5, POISON), StepError),
    "cannot be computed, several answers": (lambda: of_ids(5, POISON, n=3, temperature=1.0), StepError),
}


def poison(engine: lf.Engine, monkeypatch, when: str) -> None:
    """Steps in which a poisoned prompt is computed fail, before anything is done or after everything is."""
    launch = engine._runner.launch

    def failing(chunks):
        made = None if when == "before" else launch(chunks)
        if any(chunk.sequence.prompt.ids[0] == POISON for chunk in chunks):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made or launch(chunks)

    monkeypatch.setattr(engine._runner, "launch", failing)


@pytest.fixture(scope="module")
def engine(pair):
    with pair.engine(background=True, max_n=8) as engine:
        yield engine


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_alone(engine, good, monkeypatch, name):
    make, kind = BAD[name]
    poison(engine, monkeypatch, "before")
    before, after = good[0], good[4]
    handles = [engine.submit(before[0]), engine.submit(make()), engine.submit(after[0])]
    with pytest.raises(kind):
        handles[1].result(WAIT)
    assert handles[0].result(WAIT).token_ids == before[1] and handles[2].result(WAIT).token_ids == after[1]
    assert_idle(engine)


def test_an_image_of_one_pixel_is_answered(engine, pair):
    request = lf.Request(token_ids=[1, IMAGE, 9], images=[np.full((1, 1, 3), 200, np.uint8)])
    assert engine.generate([request])[0].token_ids == pair.reference(request)


def test_settings_outside_their_range_are_refused_at_once():
    for wrong in (
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"min_tokens": -1}, {"temperature": -1}, {"temperature": float("nan")},
        {"temperature": "hot"}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"n": 0}, {"n": True},
        {"repetition_penalty": 0.0}, {"presence_penalty": float("inf")}, {"logprobs": 101}, {"prompt_logprobs": -1},
        {"seed": 1 << 64}, {"stop": ""}, {"stop": ["a", 3]}, {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}}, {"min_tokens": 3, "max_tokens": 2},
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError):
            lf.SamplingParams(**wrong)
    for wrong in ({"priority": "high"}, {"priority": None}, {"cache_salt": 3}, {"sampling": None}, {"timeout": "5"}):
        with pytest.raises(InvalidRequestError):
            lf.Request(token_ids=[1], **wrong)


def test_what_is_no_request_leaves_no_trace(engine, good):
    for wrong in (None, "hello", {"messages": []}):
        with pytest.raises(AttributeError):
            engine.submit(wrong)
    assert_idle(engine)
    assert_right(engine, good)


@pytest.mark.parametrize("when, lookahead", [("before", 0), ("after", 1)])
def test_after_a_thousand_good_and_bad_requests_all_is_free_and_right(pair, good, monkeypatch, when, lookahead):
    rng = np.random.default_rng(lookahead)
    makers = [(make, kind) for make, kind in BAD.values()]
    wanted: list[tuple[lf.Request, list[int] | type]] = []
    for _ in range(1000):
        if rng.random() < 0.5:
            wanted.append(good[rng.integers(len(good))])
        else:
            make, kind = makers[rng.integers(len(makers))]
            wanted.append((make(), kind))
    with pair.engine(
        max_n=8, max_sequences=6, max_step_tokens=48, kv_cache_bytes=1 << 18, block_size=8, lookahead=lookahead
    ) as engine:
        poison(engine, monkeypatch, when)
        completions = engine.generate([request for request, _ in wanted])
        for completion, (_, expected) in zip(completions, wanted, strict=True):
            if isinstance(expected, list):
                assert completion.error is None and completion.token_ids == expected
            else:
                assert isinstance(completion.error, expected)
        assert_idle(engine)
        stats = engine.stats()
        assert stats.finished["StepError"] and stats.finished["ImageError"] and stats.finished["InvalidRequestError"]
        assert sum(stats.finished.values()) == len(wanted)
        assert_right(engine, good)


def test_penalties_and_draws_are_the_same_after_a_step_was_tried_again(pair, monkeypatch):
    """The failed step had drawn and counted its tokens already."""
    settings = {"max_tokens": 12, "temperature": 1.0, "seed": 4, "frequency_penalty": 1.5, "presence_penalty": 0.5}
    request, answers = of_ids(9, **settings), []
    for spoiled in (False, True):
        with pair.engine() as engine:
            poison(engine, monkeypatch, "after")
            handle = engine.submit(request)
            for _ in range(5):
                engine.step()
                if spoiled:
                    engine.submit(of_ids(4, POISON))
            answers.append(handle.result(WAIT).token_ids)
    assert answers[0] == answers[1]


def test_what_a_failed_step_had_allocated_is_free_before_it_is_tried_again(pair, monkeypatch):
    big, alive = [], []
    with pair.engine() as engine:
        launch = engine._runner.launch

        def failing(chunks):
            alive.append(any(reference() is not None for reference in big))
            tensor = np.zeros(1000)
            big.append(weakref.ref(tensor))
            if len(chunks) > 1 or chunks[0].sequence.prompt.ids[0] == POISON:
                raise RuntimeError("out of memory")
            return launch(chunks)

        monkeypatch.setattr(engine._runner, "launch", failing)
        done = engine.generate([of_ids(5, max_tokens=1), of_ids(5, POISON), of_ids(6, max_tokens=1)])
    assert [c.error is None for c in done] == [True, False, True]
    assert isinstance(done[1].error.__cause__, RuntimeError)
    assert len(alive) == 4 and not any(alive)


# ---- deadlines, the queue, cancelling


def test_a_request_that_is_late_keeps_what_it_had(pair, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr("llava_fast.engine.engine.time", fake)
    with pair.engine() as engine:
        request = lf.Request(token_ids=[1, 9, 9], timeout=5, sampling=lf.SamplingParams(max_tokens=90, ignore_eos=True))
        late, other = engine.submit(request), engine.submit(of_ids(4, max_tokens=8))
        for _ in range(4):
            engine.step()
        clock.now += 4.9
        engine.step()
        assert not late.done
        clock.now += 0.2
        engine.step()
        assert late.done and len(other.result(WAIT).token_ids) == 8
        deltas = []
        with pytest.raises(DeadlineError):
            for delta in late:
                deltas += delta.token_ids
        assert len(deltas) == 5
        assert_idle(engine)
        assert not engine._deadlines


def test_deadlines_of_what_is_done_are_forgotten(pair):
    with pair.engine() as engine:
        for timeout in (50.0, 20.0, 1e300):
            request = lf.Request(token_ids=[1, 9], timeout=timeout, sampling=lf.SamplingParams(max_tokens=2))
            assert engine.generate([request])[0].error is None
        engine.step()
        assert not engine._deadlines


@pytest.fixture
def slow_images(monkeypatch):
    """Images are read only once the event is set."""
    go, read = threading.Event(), ImageReader.read
    monkeypatch.setattr(ImageReader, "read", lambda *given: go.wait(WAIT) and read(*given))
    yield go
    go.set()


def test_a_deadline_passes_while_the_image_is_read(pair, slow_images):
    with pair.engine(background=True) as engine:
        handle = engine.submit(lf.Request(messages=question(image=TINY), timeout=0.05))
        with pytest.raises(DeadlineError):
            handle.result(WAIT)
        slow_images.set()
        assert_idle(engine)
        assert engine.generate([ask()])[0].error is None


def test_a_timeout_longer_than_clocks_count_is_none(pair, slow_images):
    with pair.engine(background=True) as engine:
        settings = lf.SamplingParams(max_tokens=3)
        handle = engine.submit(lf.Request(messages=question(image=TINY), timeout=1e300, sampling=settings))
        assert engine.submit(ask()).result(WAIT)  # from here on the engine waits for nothing but the image
        slow_images.set()
        assert len(handle.result(WAIT).token_ids) <= 3


def test_a_full_queue_refuses_and_has_room_again(pair):
    with pair.engine(max_queue=2, max_sequences=1) as engine:
        running = engine.submit(of_ids(4, max_tokens=30))
        engine.step()
        waiting = [engine.submit(of_ids(4, max_tokens=2)) for _ in range(2)]
        with pytest.raises(QueueFullError):
            engine.submit(of_ids(4))
        assert engine.stats().waiting == 2
        waiting[0].cancel()
        engine.step()
        third = engine.submit(of_ids(4, max_tokens=2))
        assert [len(h.result(WAIT).token_ids) for h in (running, waiting[1], third)] == [30, 2, 2]
        assert_idle(engine)


def test_cancelled_while_the_image_is_read(pair, slow_images):
    with pair.engine(background=True) as engine:
        handle = engine.submit(ask(TINY))
        handle.cancel()
        with pytest.raises(CancelledError):
            handle.result(WAIT)
        slow_images.set()
        assert engine.generate([ask()])[0].error is None
        assert_idle(engine)
        assert engine.stats().images == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_cancelled_before_while_waiting_while_reading_and_while_answering(pair, good, steps):
    with pair.engine(max_step_tokens=32, max_sequences=2) as engine:
        handles = [engine.submit(of_ids(100, first, max_tokens=20, n=2, temperature=1.0)) for first in (1, 2, 3)]
        for _ in range(steps):
            engine.step()
        for handle in handles:
            handle.cancel()
            handle.cancel()
            with pytest.raises(CancelledError):
                handle.result()
            with pytest.raises(CancelledError):
                list(handle)
        engine.step()
        assert_idle(engine)
        assert engine.stats().finished["cancelled"] == 3
        assert_right(engine, good)


def test_cancelling_what_is_done_changes_nothing(pair):
    with pair.engine() as engine:
        handle = engine.submit(of_ids(4, max_tokens=3))
        tokens = handle.result().token_ids
        handle.cancel()
        assert handle.result().token_ids == tokens and len(tokens) == 3
        assert engine.stats().finished == {"length": 1}


def test_cancelled_from_another_thread(pair, good):
    with pair.engine(background=True) as engine:
        handle = engine.submit(of_ids(4, max_tokens=500))
        next(iter(handle))
        canceller = threading.Thread(target=handle.cancel)
        canceller.start()
        with pytest.raises(CancelledError):
            handle.result(WAIT)
        canceller.join()
        assert_right(engine, good)
        assert_idle(engine)


# ---- the engine's own end


def test_a_closed_engine_says_so(pair):
    engine = pair.engine()
    running, waiting = engine.submit(of_ids(4, max_tokens=50)), engine.submit(of_ids(4, max_tokens=50))
    engine.step()
    engine.close()
    engine.close()
    for handle in (running, waiting):
        with pytest.raises(EngineClosedError):
            handle.result()
    for use in (engine.step, lambda: engine.submit(ask()), lambda: engine.generate([ask()])):
        with pytest.raises(EngineClosedError):
            use()
    assert engine.failed is None
    assert_idle(engine)


def test_close_ends_what_is_on_its_way_in(pair, slow_images):
    engine = pair.engine(background=True)
    handles = [engine.submit(ask(TINY)) for _ in range(20)]
    threading.Timer(0.05, slow_images.set).start()
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result(WAIT)


def test_no_request_is_lost_between_submit_and_close(pair):
    for _ in range(10):
        engine, handles = pair.engine(background=True), []

        def submit(engine=engine, handles=handles):
            try:
                while True:
                    handles.append(engine.submit(of_ids(4, max_tokens=50)))
            except (EngineClosedError, QueueFullError):
                return

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(handles) < 5:
            time.sleep(0.001)
        engine.close()
        for thread in threads:
            thread.join()
        for handle in handles:
            try:
                handle.result(WAIT)
            except EngineClosedError:
                continue


@pytest.mark.parametrize("background", [False, True])
def test_a_fault_of_the_engine_itself_stops_it_and_is_named(pair, monkeypatch, background):
    engine = pair.engine(background=background)

    def broken():
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(engine._scheduler, "schedule", broken)
    try:
        handle = engine.submit(of_ids(4))
        with pytest.raises(EngineClosedError, match="a fault"):
            handle.result(WAIT)
    finally:
        engine.close()
    assert isinstance(engine.failed, ZeroDivisionError)
    with pytest.raises(EngineClosedError, match="ZeroDivisionError"):
        engine.submit(of_ids(4))
    assert engine._thread is None or not engine._thread.is_alive()


def test_generate_that_fails_leaves_nothing_running(pair):
    def requests():
        yield of_ids(4, max_tokens=200)
        raise KeyError("the caller's own fault")

    with pair.engine() as engine:
        with pytest.raises(KeyError):
            engine.generate(requests())
        engine.step()
        assert_idle(engine)


@pytest.mark.parametrize("budget, cure", [(1, "raise kv_cache_bytes=1"), (1 << 52, "lower kv_cache_bytes")])
def test_a_cache_that_cannot_be_is_refused(pair, budget, cure):
    with pytest.raises(lf.errors.ConfigError, match=cure):
        pair.engine(kv_cache_bytes=budget)
