"""Engines as guests: beside an event loop, threads and another process, leaving nothing changed and nothing behind."""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import llava_fast as lf
from llava_fast.engine.handle import Handle
from llava_fast.engine.job import Job
from llava_fast.engine.sequence import Sequence
from llava_fast.errors import CancelledError, EngineClosedError
from tests.engine.conftest import IMAGE, picture

WAIT = 60  # seconds; no test waits so long unless it fails


def ask(first: int = 9, tokens: int = 6, image: np.ndarray | None = None, **fields) -> lf.Request:
    ids, images = ([1, first, 30, 31], []) if image is None else ([1, IMAGE, first], [image])
    return lf.Request(token_ids=ids, images=images, sampling=lf.SamplingParams(max_tokens=tokens), **fields)


@pytest.fixture(scope="module")
def expected(pair) -> dict[int, list[int]]:
    return {first: pair.reference(ask(first)) for first in range(5, 15)}


def engine_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("llava_fast")]


def process_wide() -> dict:
    """Everything that a program may have set up for itself and a guest must leave alone."""
    root = logging.getLogger()
    return {
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "event loop policy": asyncio.get_event_loop_policy(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": torch.get_rng_state().tolist(),
        "numpy random": np.random.get_state()[1].tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "loggers": (root.level, list(root.handlers), list(root.filters), logging.root.manager.disable),
        "our logger": (logging.getLogger("llava_fast").handlers, logging.getLogger("llava_fast").level),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "warnings": list(warnings.filters),
        "at exit": atexit._ncallbacks(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.gettrace(), sys.getprofile()),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "recursion": (sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()),
        "children": multiprocessing.active_children(),
    }


def test_two_engines_beside_a_loop_a_pool_and_a_child(pair, expected):
    """One is closed while the other answers; the program around them finds everything as it was."""
    with pair.engine() as engine:  # whatever is imported or compiled at the first use
        engine.generate([ask(image=picture(np.random.default_rng(0)))])
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(7)"], stdin=subprocess.PIPE)
    pool, ticks = ThreadPoolExecutor(2), []
    before = process_wide()

    async def tick():
        while True:
            ticks.append(await asyncio.get_running_loop().run_in_executor(pool, threading.get_ident))
            await asyncio.sleep(0)

    async def main():
        ticking = asyncio.create_task(tick())
        one, two = pair.engine(background=True), pair.engine(background=True)
        answers = await asyncio.gather(*(engine.submit(ask(n)) for n in expected for engine in (one, two)))
        assert [a.token_ids for a in answers] == [tokens for tokens in expected.values() for _ in range(2)]
        image = picture(np.random.default_rng(1))
        seen = await asyncio.gather(*(engine.submit(ask(image=image)) for engine in (one, two)))
        assert seen[0].token_ids == seen[1].token_ids == pair.reference(ask(image=image))

        cache, left = weakref.ref(one._runner.cache.memory), two.submit(ask(5, tokens=200))
        one.close()
        one_gone = weakref.ref(one)
        del one
        gc.collect()
        assert cache() is None and one_gone() is None
        assert sum(t.name == "llava_fast.Engine" for t in engine_threads()) == 1
        assert (await two.submit(ask(6))).token_ids == expected[6]
        assert len((await left).token_ids) > 5
        two.close()
        assert not engine_threads()
        count = len(ticks)
        await asyncio.sleep(0.01)
        ticking.cancel()
        assert count and len(ticks) > count  # the loop was never held up for good

    asyncio.run(main())
    after = process_wide()
    assert [name for name in before if before[name] != after[name]] == []
    assert pool.submit(lambda: 5).result() == 5
    pool.shutdown()
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(WAIT) == 7


def alive(*kinds: type) -> int:
    gc.collect()
    return sum(type(o) in kinds for o in gc.get_objects())


def fewest_alive(*kinds: type) -> int:
    """Once the engine's thread has let go of the step whose answer is already out: it may still be on its way."""
    fewest, until = alive(*kinds), time.monotonic() + 1
    while fewest and time.monotonic() < until:
        time.sleep(0.02)
        fewest = min(fewest, alive(*kinds))
    return fewest


def test_a_thousand_opened_and_cancelled_leave_nothing(pair):
    with pair.engine(background=True) as engine:
        image, rng = picture(np.random.default_rng(3)), np.random.default_rng(4)

        def cycles(count: int) -> None:
            for number in range(count):
                # 400 tokens, so that none is through before its cancellation arrives
                request = ask(5 + number % 300, tokens=400, image=image if number % 10 == 0 else None, timeout=1000.0)
                handle = engine.submit(request)
                if rng.random() < 0.3:
                    next(iter(handle))
                handle.cancel()
            del handle
            assert engine.generate([ask()])[0].error is None  # by now everything before has been taken in

        tracemalloc.start()
        try:
            engine.generate([ask(n, tokens=400) for n in range(5, 105)])  # the prefix cache is as large as it gets
            cycles(100)
            objects = fewest_alive(Handle, Job, Sequence)
            before = tracemalloc.get_traced_memory()[0]
            cycles(1000)
            assert fewest_alive(Handle, Job, Sequence) <= objects
            assert tracemalloc.get_traced_memory()[0] - before < 200_000  # 200 bytes a request
        finally:
            tracemalloc.stop()
        stats = engine.stats()
        assert stats.blocks_held == stats.running == stats.waiting == 0 and stats.finished["cancelled"] > 900
        assert not engine._jobs and len(engine_threads()) <= 5
    assert not engine_threads()


def test_engines_opened_and_closed_leave_nothing(pair, expected):
    caches = []
    for _ in range(30):
        with pair.engine(background=True) as engine:
            handle = engine.submit(ask(7, tokens=300))
            caches.append(weakref.ref(engine._runner.cache.memory))
        with pytest.raises(EngineClosedError):
            handle.result()
    gc.collect()
    assert not any(cache() is not None for cache in caches) and not engine_threads()


@pytest.mark.parametrize("background", [False, True])
def test_an_engine_that_nobody_keeps_goes_away_with_its_threads(pair, background):
    engine = pair.engine(background=background)
    handle = engine.submit(ask(image=picture(np.random.default_rng(5))))
    completion = handle.result(WAIT)
    gone, threads = weakref.ref(engine), engine_threads()
    del engine
    gc.collect()
    for thread in threads:
        thread.join(WAIT)
    gc.collect()
    assert gone() is None and not engine_threads()
    assert handle.result() is completion  # what was answered stays


def test_an_engine_is_kept_until_its_last_answer_is_there(pair, expected):
    engine = pair.engine(background=True)
    handle = engine.submit(ask(8))
    del engine
    gc.collect()
    assert handle.result(WAIT).token_ids == expected[8]


def test_a_program_that_ends_without_closing_ends_well():
    """A thread inside native code at the end of a program would bring it down."""
    program = """
import numpy as np, llava_fast as lf
from types import SimpleNamespace
from llava_fast.processor import ImageProcessor, Processor
config = lf.ModelConfig.preset("tiny")
model = lf.Llava(config)
tokenizer = SimpleNamespace(eos_id=2, bos_id=1, decode=lambda ids: "a" * len(ids))
processor = Processor(tokenizer, ImageProcessor(config.vision.image_size), template="v1",
                      image_token_id=config.image_token_id, tokens_per_image=config.tokens_per_image)
engine = lf.Engine(model, processor, lf.EngineConfig(kv_cache_bytes=1 << 22))
long = lf.SamplingParams(max_tokens=2000, ignore_eos=True)
handles = [engine.submit(lf.Request(token_ids=[5, n], sampling=long)) for n in range(3, 9)]
next(iter(handles[0]))
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT * 3)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


# ---- ways to wait for an answer


def test_async_readers(pair, expected):
    async def main():
        with pair.engine(background=True) as engine:
            tokens = []
            async for delta in engine.submit(ask(5)):
                tokens += delta.token_ids
            assert tokens == expected[5]
            assert (await engine.submit(ask(6))).token_ids == expected[6]
            async with engine.submit(ask(7, tokens=400)) as handle:
                async for _ in handle:
                    break
            with pytest.raises(CancelledError):
                await handle
            handle = engine.submit(ask(8, tokens=400))
            waiting = asyncio.create_task(handle.__aiter__().__anext__())
            await asyncio.sleep(0)
            waiting.cancel()  # a reader that gives up does not end the request
            with pytest.raises(asyncio.CancelledError):
                await waiting
            both = await asyncio.gather(_of(handle), _of(handle))
            assert both[0] is both[1] and both[0].token_ids[:6] == expected[8]

    asyncio.run(main())


async def _of(handle: Handle) -> lf.Completion:
    return await handle


def test_one_handle_read_from_two_loops_and_a_thread(pair, expected):
    with pair.engine(background=True) as engine:
        handle, found = engine.submit(ask(9)), []
        threads = [threading.Thread(target=lambda: found.append(asyncio.run(_of(handle)))) for _ in range(2)]
        threads.append(threading.Thread(target=lambda: found.append(handle.result(WAIT))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [c.token_ids for c in found] == [expected[9]] * 3


def test_a_host_loop_that_calls_step_serves_async_readers(pair, expected):
    async def main():
        with pair.engine() as engine:

            async def host():
                while True:
                    engine.step()
                    await asyncio.sleep(0)

            hosting = asyncio.create_task(host())
            done = await asyncio.gather(*(engine.submit(ask(n)) for n in expected))
            hosting.cancel()
            assert [c.token_ids for c in done] == list(expected.values())

    asyncio.run(main())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("way", ["generate", "iterate", "result"])
def test_several_threads_ask_at_once(pair, expected, background, way):
    """In an engine without a thread of its own, those who wait do the work."""

    def work(engine: lf.Engine) -> list[list[int]]:
        if way == "generate":
            return [c.token_ids for c in engine.generate([ask(n) for n in expected])]
        handles = [engine.submit(ask(n)) for n in expected]
        if way == "result":
            return [h.result(WAIT).token_ids for h in handles]
        return [[token for delta in h for token in delta.token_ids] for h in handles]

    room = 15 if way == "generate" else 100  # only generate waits for room in the queue
    with pair.engine(background=background, max_queue=room) as engine, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, [engine] * 4))
    assert found == [list(expected.values())] * 4


def test_step_by_step_without_a_thread(pair, expected):
    with pair.engine() as engine:
        assert not engine.step() and not engine_threads()
        handle, steps = engine.submit(ask(5)), 0
        while engine.step():
            steps += 1
        assert handle.done and handle.result(timeout=0).token_ids == expected[5]
        assert steps <= 8 and not engine.step()


@pytest.mark.parametrize("background", [False, True])
def test_a_result_that_is_not_there_in_time_can_be_asked_for_again(pair, background):
    with pair.engine(background=background) as engine:
        handle = engine.submit(ask(5, tokens=60))
        with pytest.raises(TimeoutError):
            handle.result(timeout=0)
        assert handle.result(WAIT).outputs


def test_a_block_left_early_cancels(pair):
    with pair.engine() as engine:
        with engine.submit(ask(5, tokens=300)) as handle:
            assert next(iter(handle)).token_ids
        with pytest.raises(CancelledError):
            handle.result()
        with engine.submit(ask(5)) as handle:
            assert handle.result().token_ids
        assert handle.result().error is None
