"""Scheduler: which tokens of which sequences the next step computes. Knows blocks and counts, no tensors."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from llava_fast.engine.blocks import BlockPool
from llava_fast.engine.sequence import Sequence


@dataclass(slots=True)  # not frozen: making one a token would take three times as long
class Chunk:
    """Tokens ``start`` to ``start + count - 1`` of a sequence, whose keys and values the step computes.

    Attributes:
        draws: whether the sequence's next token is drawn at the chunk's end.
    """

    sequence: Sequence
    start: int
    count: int
    draws: bool


class Scheduler:
    """First come, first served within a priority; running answers first, then as much of the waiting prompts as fits.

    A sequence is in ``waiting``, in ``running`` or nowhere. Both lists are in order: lowest priority number, then
    arrival. When a running sequence finds no free block, the last of the running gives all of its blocks back and waits
    again; what it has generated is computed again with its prompt (preemption by recomputation).

    Args:
        pool: the blocks.
        block_size: tokens of a block.
        max_sequences: most running sequences.
        max_step_tokens: most tokens of a step.
        reserve: while most blocks are free, give a sequence all that it can come to need at once, so that they lie in
            one piece.
    """

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_sequences: int, max_step_tokens: int, reserve: bool = False
    ):
        self.pool = pool
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.reserve = reserve
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.prefix_tokens = self.cached_tokens = 0
        self._slots = list(range(max_sequences - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if sequence.slot >= 0:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.finished = True

    def schedule(self) -> list[Chunk]:
        """What the next step computes; empty when there is nothing to do now."""
        before = self.preemptions
        chunks = self._continue_running()
        if self.preemptions == before:
            used = sum(chunk.count for chunk in chunks)
            chunks += self._admit_waiting(self.max_step_tokens - used)
        return chunks

    def advance(self, chunks: list[Chunk]) -> None:
        """The step with these chunks has been launched."""
        size = self.block_size
        for chunk in chunks:
            sequence = chunk.sequence
            before, sequence.computed = chunk.start, chunk.start + chunk.count
            if chunk.draws:
                sequence.length += 1
                sequence.on_device = True
            if before // size != sequence.computed // size:
                self.publish(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let others find the full blocks of a running sequence whose tokens are computed and known."""
        blocks, size = sequence.blocks, self.block_size
        while (done := len(sequence.chain)) < min(sequence.computed, sequence.known) // size:
            sequence.chain.append(self.pool.publish(blocks[done], sequence.key(done, size)))

    def _continue_running(self) -> list[Chunk]:
        chunks = []
        waiting = [(sequence, sequence.pending) for sequence in self.running]
        # A prompt in chunks must not hold up the answers behind it: their tokens are set aside first.
        room = self.max_step_tokens - sum(pending == 1 for _, pending in waiting)
        for sequence, pending in waiting:
            count = 1 if pending == 1 else min(pending, room)
            if not count or sequence.slot < 0:  # gave way to one before it
                continue
            end = sequence.computed + count
            if end > len(sequence.blocks) * self.block_size and not self._extend(sequence, end):
                continue
            room -= count if pending > 1 else 0
            chunks.append(_chunk(sequence, count))
        return chunks

    def _extend(self, sequence: Sequence, length: int) -> bool:
        """Blocks for ``length`` tokens, taken from others if need be. False where the sequence itself gave way."""
        while len(sequence.blocks) * self.block_size < length:
            if self.pool.free:
                sequence.blocks.append(self.pool.take(after=sequence.blocks[-1]))
                continue
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.preemptions += 1
        self.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.slot, sequence.computed, sequence.written, sequence.on_device = -1, 0, 0, False
        sequence.blocks, sequence.chain = [], []

    def _admit_waiting(self, room: int) -> list[Chunk]:
        """Strictly in order: one that does not fit yet holds up those behind it, so none waits for ever."""
        chunks = []
        while self.waiting and self._slots and room > 0:
            sequence = self.waiting[0]
            if sequence.in_flight or not self._start(sequence):
                break
            self.waiting.pop(0)
            insort(self.running, sequence, key=lambda s: s.order)
            count = min(sequence.pending, room)
            room -= count
            chunks.append(_chunk(sequence, count))
        return chunks

    def _start(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, cached ones where they can be found; False if they do not fit."""
        found = self._find_prefix(sequence)
        cached = [block for block, _ in found]
        wanted = -(-sequence.length // self.block_size) - len(found)
        spare = min(len(self.running), self.pool.num_blocks // 50)  # for the next tokens of those that run
        if self.pool.free - self.pool.idle_among(cached) - wanted < spare:
            return False
        if self.reserve:
            most = -(-(len(sequence.prompt.ids) + sequence.limit) // self.block_size) - len(found)
            wanted = most if self.pool.free - most > self.pool.num_blocks // 2 else wanted
        self.pool.hold(cached)
        sequence.blocks = cached
        for _ in range(wanted):
            sequence.blocks.append(self.pool.take(after=sequence.blocks[-1] if sequence.blocks else None))
        sequence.chain = [number for _, number in found]
        sequence.computed = len(found) * self.block_size
        sequence.slot = self._slots.pop()
        self.prefix_tokens += sequence.length
        self.cached_tokens += sequence.computed
        return True

    def _find_prefix(self, sequence: Sequence) -> list[tuple[int, int]]:
        """(block, number) of the beginning that is computed already. The last token never is: its logits are needed."""
        if sequence.scored < len(sequence.prompt.ids):
            return []
        found: list[tuple[int, int]] = []
        sequence.chain = []
        for index in range((sequence.length - 1) // self.block_size):
            hit = self.pool.find(sequence.key(index, self.block_size))
            if hit is None:
                break
            found.append(hit)
            sequence.chain.append(hit[1])
        sequence.chain = []
        return found


def _chunk(sequence: Sequence, count: int) -> Chunk:
    start = sequence.computed
    return Chunk(sequence, start, count, draws=start + count == sequence.length)
