"""Sequence: one answer in the making, as the scheduler and the runner see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llava_fast.engine.blocks import Key
from llava_fast.engine.prompt import Prompt
from llava_fast.engine.request import SamplingParams
from llava_fast.engine.text import TextStream

if TYPE_CHECKING:
    from llava_fast.engine.job import Job


class Sequence:
    """A prompt and what has been generated after it.

    Attributes:
        ids: (capacity,) int64, of which the first ``known`` are filled.
        asked: tokens of the prompt.
        known: tokens on the host.
        length: those and the ones that launched steps draw and the host has not read yet.
        simple: nothing about a token is told, and none is favoured: no log-probability and no bias.
        plain: simple, and the likeliest token is taken, whatever came before.
        computed: tokens whose keys and values a launched step has put, or will put, into the cache.
        blocks: its blocks of the cache, in order.
        chain: the published number of each of its full blocks.
        slot: its row of the runner's tables while it runs, else -1.
        on_device: whether its last token was drawn since it last got a slot, and so lies in the runner's tables.
        order: the lowest goes first: priority, arrival, index.
        written: how many of its blocks are in the runner's block table.
        scored: prompt tokens that have their log-probability, or need none.
    """

    __slots__ = (
        "asked", "blocks", "chain", "computed", "finished", "ids", "index", "job", "known", "length", "limit",
        "on_device", "order", "plain", "prompt", "root", "sampling", "scored", "seed", "simple", "slot", "stop_ids",
        "text", "written",
    )  # fmt: skip

    def __init__(
        self,
        job: Job,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        index: int,
        limit: int,
        order: tuple[int, int, int],
        root: str,
        seed: int,
        stop_ids: tuple[int, ...],
        text: TextStream,
    ):
        self.job, self.prompt, self.sampling = job, prompt, sampling
        self.index, self.limit, self.order, self.root, self.seed = index, limit, order, root, seed
        self.stop_ids, self.text = stop_ids, text
        self.asked = self.known = self.length = len(prompt.ids)
        self.ids = np.empty(self.known + limit, dtype=np.int64)
        self.ids[: self.known] = prompt.ids
        self.computed = self.written = 0
        self.simple, self.plain = sampling.simple, sampling.plain
        scores = sampling.prompt_logprobs is not None and index == 0
        self.scored = 1 if scores else self.known  # nothing predicts the first
        self.slot = -1
        self.on_device = self.finished = False
        self.blocks: list[int] = []
        self.chain: list[int] = []

    @property
    def in_flight(self) -> int:
        """Tokens that launched steps draw and the host has not read yet."""
        return self.length - self.known

    @property
    def generated(self) -> int:
        """Tokens of the answer, those in flight included."""
        return self.length - self.asked

    @property
    def pending(self) -> int:
        """Tokens that the next step could compute."""
        return 0 if self.length >= self.asked + self.limit else self.length - self.computed

    def append(self, token: int) -> None:
        """A token that was in flight has come."""
        self.ids[self.known] = token
        self.known += 1

    def key(self, index: int, block_size: int) -> Key:
        """What block ``index``, which must be full, is found by; the blocks before it must have their numbers."""
        first, last = index * block_size, (index + 1) * block_size
        parent = self.chain[index - 1] if index else self.root
        return parent, self.ids[first:last].tobytes(), self.prompt.digests_within(first, last)
