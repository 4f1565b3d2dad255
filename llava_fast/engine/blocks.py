"""The blocks of the key-value cache: who holds each, and which computed beginning of a prompt it can be found by.

A full block is found by what it holds and by the block before it: the parent's number, its token ids and the digests of
its images. Numbers are never used twice, so two keys are equal only where everything up to their end is equal: ids and
images are compared, not only hashed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Key = tuple[int | str, bytes, tuple[bytes, ...]]  # (number of the parent, or the salt at the root; ids; image digests)


class BlockPool:
    """``num_blocks`` blocks. Those that nobody holds keep their contents until they are needed."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # held by nobody; next one first
        self._found_by: list[Key | None] = [None] * num_blocks
        self._number = [0] * num_blocks  # of what the block holds
        self._published: dict[Key, int] = {}
        self._last_number = 0

    @property
    def free(self) -> int:
        """Blocks that can be had, cached ones included."""
        return len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by what they hold."""
        return len(self._published)

    def idle_among(self, blocks: Sequence[int]) -> int:
        return sum(not self._holders[b] for b in blocks)

    def take(self, after: int | None = None) -> int:
        """A block for one holder, what it held forgotten: the one behind ``after`` where that is unused, so that a
        sequence lies in one piece if it can, else the one that has been idle longest."""
        block = -1 if after is None else after + 1
        if block < 1 or block >= self.num_blocks or self._holders[block] or self._found_by[block]:
            block = next(iter(self._idle))
        del self._idle[block]
        key = self._found_by[block]
        if key is not None:
            del self._published[key]
            self._found_by[block] = None
        self._holders[block] = 1
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more for each."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. Of a sequence's blocks the last are reused first: no block is of use without those
        before it."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._idle[block] = None
                if self._found_by[block] is None:
                    self._idle.move_to_end(block, last=False)

    def find(self, key: Key) -> tuple[int, int] | None:
        """(block, number) of what ``key`` describes, if it is there."""
        block = self._published.get(key)
        return None if block is None else (block, self._number[block])

    def publish(self, block: int, key: Key) -> int:
        """Let a full, computed block be found. Returns the number that its children's keys start with."""
        found = self.find(key)
        if found is not None:  # another sequence computed the same; this copy stays unfindable
            return found[1]
        self._last_number += 1
        self._published[key] = block
        self._found_by[block] = key
        self._number[block] = self._last_number
        return self._last_number

    def forget(self) -> None:
        """Make every cached block unfindable. The first blocks are given out first again, in one piece."""
        self._idle = OrderedDict.fromkeys(sorted(self._idle))
        self._published.clear()
        self._found_by = [None] * self.num_blocks
