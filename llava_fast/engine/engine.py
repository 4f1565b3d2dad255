"""Engine: requests in, text out. ``step`` is schedule, run, postprocess."""

from __future__ import annotations

import heapq
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from threading import TIMEOUT_MAX, Event, Lock, RLock, Thread, current_thread, main_thread
from traceback import clear_frames

import torch

from llava_fast.engine.answers import deliver, keep_prompt_logprobs
from llava_fast.engine.blocks import BlockPool
from llava_fast.engine.config import EngineConfig
from llava_fast.engine.handle import Handle
from llava_fast.engine.images import FeatureCache, ImageReader
from llava_fast.engine.job import Job
from llava_fast.engine.preparer import Preparer
from llava_fast.engine.prompt import Prompt
from llava_fast.engine.request import Completion, Request
from llava_fast.engine.runner import Launched, Runner
from llava_fast.engine.scheduler import Chunk, Scheduler
from llava_fast.engine.sequence import Sequence
from llava_fast.engine.stats import Stats
from llava_fast.engine.text import TextStream
from llava_fast.errors import DeadlineError, EngineClosedError, QueueFullError, StepError
from llava_fast.model import Llava
from llava_fast.processor import Processor
from llava_fast.processor.conversation import find_template

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over a paged cache, inside the caller's process.

    Nothing process-wide is touched, and several engines may stand in one process, on one model even. The model must
    not be trained while an engine uses it, nor its weights be changed otherwise: on a CPU an engine has forms of them
    that are made once.

    Args:
        model: in the dtype and on the device that it is to run in.
        processor: the one that belongs to it.
        config: budgets; the defaults work.
        background: run steps on a thread of the engine's own. Without it, whoever calls :meth:`step`, waits for a
            handle's result or iterates over a handle does the work.

    Attributes:
        processor: as given.
        failed: what stopped the engine, such as a fault of the GPU; None while it works.
        startup: seconds that each part of the start took, by name.
        max_length: most tokens of a prompt and its answer together.

    Raises:
        ConfigError: a budget in which nothing can run.
    """

    def __init__(
        self, model: Llava, processor: Processor, config: EngineConfig | None = None, *, background: bool = True
    ):
        self.config = config = config or EngineConfig()
        self.failed: BaseException | None = None
        self.startup: dict[str, float] = {}
        self._model, self.processor = model, processor
        self._features = FeatureCache(config.feature_cache_bytes)
        with self._timed("cache"):
            self._runner = Runner(model, config, self._features)
        pool = BlockPool(self._runner.cache.num_blocks)
        self.max_length = min(self._runner.max_length, pool.num_blocks * config.block_size)
        self._scheduler = Scheduler(
            pool,
            block_size=config.block_size,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens,
            reserve=model.device.type == "cpu",  # a sequence in one piece is read without a copy
        )
        workers = min(4, os.cpu_count() or 1) if background else 0
        self._preparer = Preparer(
            processor,
            ImageReader(processor.image, self._features),
            config,
            vocab_size=model.config.text.vocab_size,
            max_length=self.max_length,
            workers=workers if config.image_workers is None else config.image_workers,
        )
        overlaps = model.device.type == "cuda"
        self._lookahead = int(overlaps) if config.lookahead is None else config.lookahead
        self._launched: deque[Launched] = deque()
        self._stats = Stats()
        self._template_stops = _stops_of(processor)

        self._inbox: deque[Callable[[], None]] = deque()  # what other threads ask of the one that steps
        self._jobs: dict[int, Job] = {}
        self._deadlines: list[tuple[float, int]] = []  # when, and which job
        self._arrivals = 0
        self._queued = 0  # submitted, not begun
        self._queue_lock = Lock()
        self._step_lock = RLock()  # one thread steps at a time
        self._wake = wake = Event()
        self._closed = False
        if config.warmup:
            with self._timed("warmup"):
                self._runner.warm_up()
        self._thread: Thread | None = None
        if background:
            ended = Event()
            work = weakref.ref(self), wake, ended
            self._thread = Thread(target=_work, args=work, name="llava_fast.Engine", daemon=True)
            self._thread.start()
            weakref.finalize(self, _halt, self._thread, wake, ended)
        log.info("engine ready: %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.startup.items()))

    # ---- the caller's side: any thread

    def submit(self, request: Request) -> Handle:
        """Take a request; returns at once. What is wrong with the request itself comes through the handle.

        Raises:
            QueueFullError: ``max_queue`` requests wait already.
            EngineClosedError: the engine was closed or has failed.
        """
        answers = min(request.sampling.n, self.config.max_n)  # more is an error, and must not take memory before
        with self._queue_lock:
            self._check_open()
            if self._queued >= self.config.max_queue:
                raise QueueFullError(
                    f"{self._queued} requests wait and max_queue={self.config.max_queue}; try later or raise it"
                )
            self._queued += 1
            self._arrivals += 1
            name = request.request_id or f"request-{self._arrivals}"
            handle = Handle(name, answers, None if self._thread is not None else self._drive)
            job = Job(request, handle, self._arrivals, time.monotonic())
            handle._on_cancel(lambda: self._ask(lambda: self._end(job, None)))
            self._ask(lambda: self._take_in(job))  # before the lock is free: who closes the engine then finds it
        self._preparer.start(
            request, done=lambda found: self._ask(lambda: self._queue(job, found)), wanted=lambda: not handle.done
        )
        return handle

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run all requests and wait for them. One that failed has its ``error`` in its completion.

        More requests than ``max_queue`` are submitted as room comes up.

        Raises:
            EngineClosedError: the engine was closed meanwhile.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self._submit_when_there_is_room(request))
            for handle in handles:
                handle._wait_until_done()
        except BaseException:  # the caller's interrupt too: nobody waits for the others any more
            for handle in handles:
                handle.cancel()
            raise
        self._check_not_closed(handles)
        return [handle._completion for handle in handles]

    def step(self) -> bool:
        """Schedule, run, postprocess: one step of the model over whatever can run. For engines without a thread.

        Returns:
            Whether there is more to do now.

        Raises:
            EngineClosedError: the engine was closed or has failed.
        """
        with self._step_lock:
            self._check_open()
            try:
                self._intake()
                chunks = self._scheduler.schedule()
                if chunks:
                    self._launch(chunks)
                if self._launched and (len(self._launched) > self._lookahead or not chunks):
                    self._postprocess(self._launched.popleft())
                return bool(chunks or self._launched or self._inbox)
            except Exception as error:
                self._fail(error)
                raise EngineClosedError(f"the engine stopped: {type(error).__name__}: {error}") from error

    def stats(self) -> Stats:
        """What the engine has done until now. Cheap; from any thread."""
        return self._stats.snapshot(self._scheduler, self._features, waiting=self._queued)

    def clear_caches(self) -> None:
        """Forget every cached prefix and image; running requests keep what they hold."""
        with self._step_lock:
            self._scheduler.pool.forget()
            self._features.clear()

    def close(self) -> None:
        """Stop, fail what is not done with EngineClosedError, and give the memory back. May be called twice."""
        with self._queue_lock:
            self._closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()
        self._preparer.close()
        with self._step_lock:
            self._release(EngineClosedError("the engine was closed before this request was done"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- requests on their way in

    def _ask(self, act: Callable[[], None]) -> None:
        """Have something done by the thread that steps."""
        self._inbox.append(act)
        self._wake.set()

    def _intake(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        now = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._jobs):
            job = self._jobs.get(heapq.heappop(self._deadlines)[1])
            if job is not None:
                late = f"request {job.handle.request_id!r} was not done within its timeout of {job.request.timeout} s"
                self._end(job, DeadlineError(late))

    def _take_in(self, job: Job) -> None:
        self._jobs[job.number] = job
        if job.request.timeout is not None:
            heapq.heappush(self._deadlines, (job.submitted + job.request.timeout, job.number))

    def _queue(self, job: Job, found: Prompt | Exception) -> None:
        """The request's prompt is ready, or could not be made."""
        if job.ended:
            return
        if isinstance(found, Exception):
            self._end(job, found)
            return
        made = self._sequences(job, found)
        texts = [sequence.text for sequence in made]
        job.handle._describe(found, texts, scored=job.request.sampling.prompt_logprobs is not None)
        job.sequences, job.forks = made[:1], made[1:]
        self._scheduler.add(job.sequences[0])

    def _sequences(self, job: Job, prompt: Prompt) -> list[Sequence]:
        request, sampling, tokenizer = job.request, job.request.sampling, self.processor.tokenizer
        stop_ids = (*(() if sampling.ignore_eos else (tokenizer.eos_id,)), *sampling.stop_token_ids)
        stops = (*sampling.stop, *(self._template_stops if request.messages is not None else ()))
        seed = int.from_bytes(os.urandom(8), "big") if sampling.seed is None else sampling.seed
        # Without prefix caching a request shares only with itself: its n answers, and what it computed before.
        root = f"shared {request.cache_salt}" if self.config.prefix_caching else f"own {job.number}"
        return [
            Sequence(
                job,
                prompt,
                sampling,
                index=index,
                limit=min(sampling.max_tokens, self.max_length - len(prompt.ids)),
                order=(request.priority, job.number, index),
                root=root,
                seed=_seed(seed, index),
                stop_ids=stop_ids,
                text=TextStream(tokenizer, stops, sampling.include_stop),
            )
            for index in range(sampling.n)
        ]

    # ---- one step

    def _launch(self, chunks: list[Chunk]) -> None:
        self._begin(chunks)
        try:
            launched = [self._runner.launch(chunks)]
        except Exception as error:
            clear_frames(error.__traceback__)  # what the failed step had allocated, before it is tried again
            launched = self._launch_apart(chunks, error)
        for step in launched:
            self._scheduler.advance(step.chunks)
            self._launched.append(step)
            self._stats.count_step(step.chunks, self._runner.images_seen)
        for chunk in chunks:
            if chunk.sequence.job.forks:
                self._fork(chunk.sequence.job)

    def _launch_apart(self, chunks: list[Chunk], error: Exception) -> list[Launched]:
        """After an exception: each sequence by itself, so that only those fail that cannot be computed. They begin
        again with what the host knows: how far the failed step came, nobody can tell."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)  # raises where the device is lost: then the engine stops
        while self._launched:
            self._postprocess(self._launched.popleft())
        for chunk in chunks:
            chunk.sequence.on_device, chunk.sequence.written = False, 0
        launched = []
        for chunk in chunks:
            if chunk.sequence.finished:  # with an earlier step, or as another answer of its request failed
                continue
            if len(chunks) > 1:
                try:
                    launched.append(self._runner.launch([chunk]))
                    continue
                except Exception as alone:
                    clear_frames(alone.__traceback__)
                    error = alone
            failure = StepError(f"{type(error).__name__} while the request was computed: {error}")
            failure.__cause__ = error
            self._end(chunk.sequence.job, failure)
        return [step for step in launched if not step.chunks[0].sequence.finished]

    def _begin(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            job = chunk.sequence.job
            if not job.started:
                job.started = True
                job.handle._begin(time.monotonic() - job.submitted, cached=chunk.start)
                with self._queue_lock:
                    self._queued -= 1

    def _fork(self, job: Job) -> None:
        """Once the first answer's prompt is computed the others begin, and find it in the cache."""
        if not job.sequences:
            return
        first = job.sequences[0]
        if first.computed >= len(first.prompt.ids):
            job.sequences += job.forks
            for sequence in job.forks:
                self._scheduler.add(sequence)
            job.forks = []

    def _postprocess(self, step: Launched) -> None:
        tokens = step.wait()
        for sequence, places, logprobs in step.prompts:
            if not sequence.finished:
                keep_prompt_logprobs(sequence, places, logprobs)
        stats = self._stats
        for row, (sequence, token) in enumerate(zip(step.sequences, tokens, strict=True)):
            sequence.append(token)
            if sequence.finished:  # cancelled, or it had ended with the token before
                continue
            if sequence.slot >= 0 and sequence.known <= sequence.computed:  # else the step's launch has done it
                self._scheduler.publish(sequence)
            job = sequence.job
            if not job.answered:
                job.answered = True
                stats.count_first_token(job.handle._first_token(job.submitted))
            stats.generated_tokens += 1
            reason = deliver(sequence, token, step.logprobs, row)
            if reason:
                self._scheduler.remove(sequence)
                job.sequences.remove(sequence)
                if not job.sequences and not job.forks:
                    self._end(job, None, reason)

    def _end(self, job: Job, error: Exception | None, reason: str = "cancelled") -> None:
        """A job is done, failed or cancelled: everything that it holds is free afterwards."""
        if job.ended:
            return
        job.ended = True
        for sequence in job.sequences + job.forks:
            self._scheduler.remove(sequence)
        job.sequences, job.forks = [], []
        self._jobs.pop(job.number, None)
        if not job.started:
            with self._queue_lock:
                self._queued -= 1
        total = time.monotonic() - job.submitted
        self._stats.count_end(type(error).__name__ if error else reason, total)
        job.handle._finish(error, total)

    # ---- the end

    def _fail(self, error: BaseException) -> None:
        """The engine cannot go on."""
        self.failed = error
        with self._queue_lock:
            self._closed = True
        stopped = EngineClosedError(f"the engine stopped: {type(error).__name__}: {error}")
        stopped.__cause__ = error
        self._release(stopped)

    def _release(self, error: Exception) -> None:
        while self._inbox:  # requests that were on their way in
            with suppress(Exception):
                self._inbox.popleft()()
        for job in list(self._jobs.values()):
            self._end(job, error)
        self._deadlines.clear()
        self._launched.clear()
        with suppress(Exception):  # a lost device cannot be waited for
            self._runner.close()

    # ---- small things

    def _check_open(self) -> None:
        if self._closed:
            why = f": {type(self.failed).__name__}: {self.failed}" if self.failed else ""
            raise EngineClosedError(f"this engine is closed{why}; make another")

    def _check_not_closed(self, handles: list[Handle]) -> None:
        for handle in handles:
            if isinstance(handle._completion.error, EngineClosedError):
                raise handle._completion.error

    def _drive(self) -> None:
        """One step for a handle's reader, in an engine without a thread; waits where images are still being read."""
        if not self.step():
            self._wake.wait(0.01)
            self._wake.clear()

    def _submit_when_there_is_room(self, request: Request) -> Handle:
        while True:
            try:
                return self.submit(request)
            except QueueFullError:
                if self._thread is None:
                    self._drive()
                else:
                    time.sleep(0.002)

    def _until_deadline(self) -> float | None:
        """Seconds to the next deadline, if there is one."""
        with self._step_lock:
            if not self._deadlines:
                return None
            return min(max(0.0, self._deadlines[0][0] - time.monotonic()), TIMEOUT_MAX)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.startup[name] = time.perf_counter() - start


def _work(reference: weakref.ref[Engine], wake: Event, ended: Event) -> None:
    """The engine's thread. Between steps it holds no reference, so that an engine nobody keeps goes away."""
    while True:
        wake.clear()
        engine = reference()
        if engine is None or engine._closed or ended.is_set():
            return
        try:
            busy = engine.step()
        except EngineClosedError:
            return
        seconds = None if busy else engine._until_deadline()
        del engine
        if not busy:
            wake.wait(seconds)


def _halt(thread: Thread, wake: Event, ended: Event) -> None:
    """When the engine goes away, or the program ends: a thread that is inside native code then would bring it down."""
    ended.set()
    wake.set()
    if not main_thread().is_alive():
        thread.join()


def _stops_of(processor: Processor) -> tuple[str, ...]:
    """The text that ends a turn, in templates that do not end it by the end of text."""
    template = find_template(processor.template)
    stop = template.stop.strip() or template.stop
    return (stop,) if stop and not template.eos else ()


def _seed(seed: int, index: int) -> int:
    """The seed of answer ``index`` of a request."""
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
