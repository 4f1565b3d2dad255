"""The scheduler without a model: random programs of requests, cancellations and steps, and what must always hold.

What a token's keys and values depend on is everything up to it: ids, images, salt. A stand-in for the cache keeps, for
each place of each block, a number that stands for exactly that; a step may only read places that hold the right ones.
"""

from __future__ import annotations

from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.engine.blocks import BlockPool
from llava_fast.engine.images import PreparedImage
from llava_fast.engine.prompt import Prompt
from llava_fast.engine.request import SamplingParams
from llava_fast.engine.scheduler import Scheduler
from llava_fast.engine.sequence import Sequence

SIZE = 4  # tokens of a block
IMAGE, ROWS = 9, 3  # id and number of an image's rows
END = 0  # the token that ends an answer
DRAWN = [END, IMAGE, *[1, 2, 3] * 5]  # a model may well draw the image's id where there is no image


def make_prompt(text: list[int], images: list[tuple[int, bytes]] = ()) -> Prompt:
    """``text`` with the rows of each (place, digest) of ``images`` put in before that place."""
    ids, starts, pictures = [], [], []
    for place in range(len(text) + 1):
        for at, digest in images:
            if at == place:
                starts.append(len(ids))
                pictures.append(PreparedImage(digest))
                ids += [IMAGE] * ROWS
        ids += text[place : place + 1]
    return Prompt(np.array(ids, dtype=np.int64), pictures, starts, ROWS)


class World:
    """A scheduler, a stand-in for the device, and every check.

    Attributes:
        device: of each live sequence its tokens, those that the host has not read included.
        contents: of each place of the cache, what was computed into it.
    """

    def __init__(
        self,
        blocks: int,
        max_sequences: int = 4,
        max_step_tokens: int = 16,
        lookahead: int = 0,
        reserve: bool = False,
    ):
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(
            self.pool,
            block_size=SIZE,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            reserve=reserve,
        )
        self.lookahead, self.max_sequences = lookahead, max_sequences
        self.launched: deque[list[Sequence]] = deque()
        self.device: dict[Sequence, list[int]] = {}
        self.contents: dict[tuple[int, int], int] = {}
        self.numbers: dict[int, int] = {}  # number of a published block -> what its last place held
        self.meanings: dict[tuple, int] = {}  # (what came before, id, image row) -> the number that stands for it
        self.answers: dict[int, list[int]] = {}
        self.arrivals = 0

    # ---- what happens

    def submit(self, prompt: Prompt, limit: int = 4, priority: int = 0, salt: str = "", scored: bool = False):
        limit = min(limit, self.pool.num_blocks * SIZE - len(prompt.ids))
        if limit < 1:  # the engine refuses such a request
            return None
        self.arrivals += 1
        sequence = Sequence(
            SimpleNamespace(number=self.arrivals),
            prompt,
            SamplingParams(prompt_logprobs=0 if scored else None),
            index=0,
            limit=limit,
            order=(priority, self.arrivals, 0),
            root=f"shared {salt}",
            seed=self.arrivals % 3,  # some alike
            stop_ids=(END,),
            text=None,
        )
        self.device[sequence] = prompt.ids.tolist()
        self.scheduler.add(sequence)
        self.check()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.device.pop(sequence, None)
        self.check()

    def step(self) -> list:
        """As the engine's step: schedule, launch, and read the oldest launched step."""
        decoding = [s for s in self.scheduler.running if s.pending == 1]
        waiting, preempted = list(self.scheduler.waiting), self.scheduler.preemptions
        chunks = self.scheduler.schedule()
        self.check()
        self.check_chunks(chunks)
        given = [chunk.sequence for chunk in chunks]
        admitted = [s for s in waiting if s in given]
        assert admitted == waiting[: len(admitted)]  # nobody overtakes
        if self.scheduler.preemptions == preempted:
            assert set(decoding) <= set(given)
        if chunks:
            self.launch(chunks)
        if self.launched and (len(self.launched) > self.lookahead or not chunks):
            self.read(self.launched.popleft())
        self.check()
        return chunks

    def launch(self, chunks: list) -> None:
        for chunk in chunks:
            sequence, ids = chunk.sequence, self.device[chunk.sequence]
            if sequence.on_device:  # its last token may be known to the device alone
                assert chunk.count == 1 and chunk.start == len(ids) - 1
            else:
                assert chunk.start + chunk.count <= sequence.known
            meanings = self.meanings_of(sequence)
            for place in range(chunk.start + chunk.count):
                at = sequence.blocks[place // SIZE], place % SIZE
                if place < chunk.start:
                    assert self.contents[at] == meanings[place]  # what attention reads
                else:
                    self.contents[at] = meanings[place]
            if chunk.draws:
                assert chunk.start + chunk.count == len(ids)
                ids.append(DRAWN[(meanings[-1] * 7 + sequence.seed) % len(DRAWN)])
        self.scheduler.advance(chunks)
        for chunk in chunks:
            if chunk.start < len(chunk.sequence.prompt.ids):  # the engine notes scores when it has read them
                chunk.sequence.scored = max(chunk.sequence.scored, chunk.sequence.computed)
        self.launched.append([chunk.sequence for chunk in chunks if chunk.draws])

    def read(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.finished:
                sequence.append(END)
                continue
            token = self.device[sequence][sequence.known]
            sequence.append(token)
            if sequence.slot >= 0:
                self.scheduler.publish(sequence)
            answered = sequence.known - len(sequence.prompt.ids)
            if token == END or answered == sequence.limit:
                self.answers[sequence.job.number] = sequence.ids[len(sequence.prompt.ids) : sequence.known].tolist()
                self.cancel(sequence)

    def drain(self) -> None:
        """Everything comes to its end: the first in line moves by a token or more in every step that is read."""
        bound = sum(len(s.prompt.ids) + s.limit + 2 for s in self.device) * (self.lookahead + 1) + 2
        for _ in range(bound):
            if not self.device and not self.launched:
                break
            self.step()
        assert not self.device and not self.launched, "it does not come to an end"
        assert self.pool.free == self.pool.num_blocks
        assert not self.scheduler.running and not self.scheduler.waiting
        assert sorted(self.scheduler._slots) == list(range(self.max_sequences))

    # ---- what must hold

    def meanings_of(self, sequence: Sequence) -> list[int]:
        found, before = [], self.meanings.setdefault((sequence.root,), len(self.meanings))
        for place, token in enumerate(self.device[sequence]):
            row = None
            for image, start in zip(sequence.prompt.images, sequence.prompt.starts, strict=True):
                if start <= place < start + ROWS:
                    row = (image.digest, place - start)
            before = self.meanings.setdefault((before, token, row), len(self.meanings))
            found.append(before)
        return found

    def check_chunks(self, chunks: list) -> None:
        assert sum(chunk.count for chunk in chunks) <= self.scheduler.max_step_tokens
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            end = chunk.start + chunk.count
            assert sequence in self.scheduler.running and not sequence.finished
            assert chunk.count >= 1 and chunk.start == sequence.computed and end <= sequence.length
            assert chunk.draws == (end == sequence.length) and len(sequence.blocks) * SIZE >= end
            assert sequence.generated < sequence.limit

    def check(self) -> None:
        running, waiting, pool = self.scheduler.running, self.scheduler.waiting, self.pool
        for line in (running, waiting):
            assert [s.order for s in line] == sorted(s.order for s in line)
        assert Counter([*running, *waiting]) == Counter(self.device.keys())  # each live one in one place, once
        assert len(running) <= self.max_sequences
        slots = [s.slot for s in running]
        assert sorted(slots + self.scheduler._slots) == list(range(self.max_sequences))
        assert all(s.slot == -1 and not s.blocks and not s.computed for s in waiting)

        owners = Counter(block for s in running for block in s.blocks)
        assert pool._holders == [owners[block] for block in range(pool.num_blocks)]
        assert set(pool._idle) == {block for block in range(pool.num_blocks) if not owners[block]}
        self.check_published()
        self.check_shared(owners)

    def check_published(self) -> None:
        """A block can be found by what was computed into it, and by nothing else."""
        pool = self.pool
        written = list(self.meanings)
        for found_by, block in pool._published.items():
            assert pool._found_by[block] == found_by
            parent, ids, digests = found_by
            meaning = self.contents[block, SIZE - 1]
            assert self.numbers.setdefault(pool._number[block], meaning) == meaning
            tokens, seen = [], set()
            for place in reversed(range(SIZE)):
                assert self.contents[block, place] == meaning
                meaning, token, row = written[meaning]
                tokens.insert(0, token)
                seen |= set() if row is None else {row[0]}
            assert np.array(tokens, dtype=np.int64).tobytes() == ids and seen == set(digests)
            begins = self.numbers[parent] if isinstance(parent, int) else self.meanings[parent,]
            assert meaning == begins
        assert sum(found_by is not None for found_by in pool._found_by) == len(pool._published)

    def check_shared(self, owners: Counter) -> None:
        """Two hold one block only as the same full block of the same beginning."""
        first: dict[int, tuple[int, int]] = {}
        for sequence in self.scheduler.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            meanings = self.meanings_of(sequence) if any(owners[b] > 1 for b in sequence.blocks) else []
            for index, block in enumerate(sequence.blocks):
                if owners[block] > 1:
                    assert (index + 1) * SIZE <= sequence.known
                    holds = index, meanings[(index + 1) * SIZE - 1]
                    assert first.setdefault(block, holds) == holds


TEXT = st.lists(st.integers(1, 3), min_size=1, max_size=9)
IMAGES = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([b"x", b"y"])), min_size=1, max_size=2)
REQUEST = st.tuples(
    st.sampled_from([[1, 2, 3, 1, 2, 3, 1, 2], [1] * 5, []]),  # beginnings in common
    TEXT,
    st.just([]) | st.just([]) | IMAGES,
    st.integers(1, 24).map(lambda less: 25 - less),
    st.integers(0, 2),
    st.sampled_from(["", "", "", "tenant"]),
    st.sampled_from([False, False, False, True]),
)
CANCEL = st.integers(0, 9)
STEPS = st.sampled_from(["step", "steps"])


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    blocks=st.integers(4, 9),
    max_sequences=st.integers(1, 4).map(lambda less: 6 - less),
    spare_tokens=st.integers(1, 12),
    reserve=st.sampled_from([False, False, True]),
    operations=st.lists(REQUEST | REQUEST | REQUEST | CANCEL | STEPS | STEPS, min_size=6, max_size=30),
)
def test_random_programs(lookahead, blocks, max_sequences, spare_tokens, reserve, operations):
    world = World(blocks, max_sequences, max_sequences + spare_tokens, lookahead, reserve)
    for operation in operations:
        if operation == "step":
            world.step()
        elif operation == "steps":
            for _ in range(6):
                world.step()
        elif isinstance(operation, int):
            if world.device:
                world.cancel(list(world.device)[operation % len(world.device)])
        else:
            common, text, images, limit, priority, salt, scored = operation
            world.submit(make_prompt(common + text, images), limit, priority, salt, scored)
    world.drain()


def text(length: int, first: int = 1) -> Prompt:
    return make_prompt([first] + [2] * (length - 1))


def test_lower_priority_numbers_first_then_arrival():
    world = World(blocks=16, max_sequences=1)
    later, sooner, soonest = (world.submit(text(4, n), limit=1, priority=p) for n, p in ((1, 1), (2, 1), (3, 0)))
    served = []
    while world.device:
        served += [chunk.sequence for chunk in world.step()]
    assert served == [soonest, later, sooner]


def test_the_last_in_line_gives_way_and_comes_before_those_that_never_ran():
    world = World(blocks=4, max_sequences=2)
    first, second = world.submit(text(7), limit=8), world.submit(text(7, 3), limit=8)
    third = world.submit(text(4, 2), limit=1)
    steps = 0
    while not world.scheduler.preemptions and steps < 8:
        world.step()
        steps += 1
    assert world.scheduler.running == [first]
    assert world.scheduler.waiting == [second, third]
    assert second.computed == 0 and second.slot == -1 and not second.blocks
    world.drain()


def test_a_prompt_in_chunks_does_not_hold_up_the_answers_behind_it():
    world = World(blocks=32, max_sequences=3, max_step_tokens=8)
    talking = world.submit(text(4), limit=20, priority=1)
    world.step()
    reading = world.submit(text(30, 3), limit=1, priority=0)
    counts = []
    while reading in world.device and talking in world.device:
        counts.append({chunk.sequence: chunk.count for chunk in world.step()})
    assert [c[reading] for c in counts] == [7, 7, 7, 7, 2]
    assert all(c[talking] == 1 for c in counts)


def test_a_beginning_that_was_computed_is_found_but_not_under_another_salt():
    world = World(blocks=16)
    prompt = text(11)
    computed = []
    for salt in ("", "", "tenant"):
        sequence = world.submit(prompt, limit=1, salt=salt)
        computed.append(next(chunk for chunk in world.step() if chunk.sequence is sequence).count)
    assert computed == [11, 11 - 2 * SIZE, 11]


def test_the_last_token_of_a_prompt_is_always_computed():
    world = World(blocks=16)
    for computed in (8, 4):  # two full blocks, of which only the first may be taken from the cache
        world.submit(text(8), limit=1)
        assert [chunk.count for chunk in world.step()] == [computed]


def test_equal_ids_with_another_image_are_not_found():
    world = World(blocks=32)
    counts = []
    for digest in (b"x", b"y", b"x"):
        world.submit(make_prompt([1] * 12, [(5, digest)]), limit=1)
        counts += [chunk.count for chunk in world.step()]
    assert counts == [15, 15 - SIZE, 15 - 3 * SIZE]  # the first block is before the image


def test_a_prompt_whose_logprobs_are_wanted_is_computed_whole():
    world = World(blocks=16)
    for scored, computed in ((False, 11), (True, 11), (False, 3)):
        world.submit(text(11), limit=1, scored=scored)
        assert [chunk.count for chunk in world.step()] == [computed]
