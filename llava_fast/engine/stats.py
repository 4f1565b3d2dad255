"""Stats: what an engine has done, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from llava_fast.engine.images import FeatureCache
from llava_fast.engine.scheduler import Chunk, Scheduler


@dataclass
class Stats:
    """A snapshot of an engine. Counts are since its start.

    Attributes:
        waiting: requests that have not begun, those whose images are being read included.
        running: answers that are being generated.
        blocks, blocks_held, blocks_cached: of the key-value cache: all; held by running answers; findable prefixes.
        prefix_tokens, cached_tokens: tokens looked up in the prefix cache, and found there.
        image_hits, image_misses: of the feature cache; ``image_bytes`` it holds.
        images: pictures that went through the vision tower.
        prompt_tokens, generated_tokens: computed for prompts (cached ones not counted), and drawn.
        preemptions: times that an answer had to give its cache blocks back.
        steps: model steps launched.
        finished: ended requests by reason: "stop", "length", "cancelled", or the name of the error's class.
        first_token_s, total_s: sums over the requests that got there, ``first_tokens`` and ``totals`` many.
    """

    waiting: int = 0
    running: int = 0
    blocks: int = 0
    blocks_held: int = 0
    blocks_cached: int = 0
    prefix_tokens: int = 0
    cached_tokens: int = 0
    image_hits: int = 0
    image_misses: int = 0
    image_bytes: int = 0
    images: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    first_token_s: float = 0.0
    first_tokens: int = 0
    total_s: float = 0.0
    totals: int = 0

    @property
    def cache_use(self) -> float:
        """Share of the cache's blocks that running answers hold."""
        return self.blocks_held / self.blocks if self.blocks else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.cached_tokens / self.prefix_tokens if self.prefix_tokens else 0.0

    @property
    def image_hit_rate(self) -> float:
        looked_up = self.image_hits + self.image_misses
        return self.image_hits / looked_up if looked_up else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, rates included, as JSON takes it."""
        rates = {name: getattr(self, name) for name in ("cache_use", "prefix_hit_rate", "image_hit_rate")}
        return {**vars(self), "finished": dict(self.finished), **rates}

    def snapshot(self, scheduler: Scheduler, features: FeatureCache, waiting: int) -> Stats:
        """This with what others count."""
        pool = scheduler.pool
        return replace(
            self,
            finished=self.finished.copy(),
            waiting=waiting,
            running=len(scheduler.running),
            blocks=pool.num_blocks,
            blocks_held=pool.num_blocks - pool.free,
            blocks_cached=pool.cached,
            prefix_tokens=scheduler.prefix_tokens,
            cached_tokens=scheduler.cached_tokens,
            preemptions=scheduler.preemptions,
            image_hits=features.hits,
            image_misses=features.misses,
            image_bytes=features.num_bytes,
        )

    def count_step(self, chunks: list[Chunk], images: int) -> None:
        self.steps += 1
        self.images = images
        for chunk in chunks:
            if (asked := chunk.sequence.asked) > chunk.start:
                self.prompt_tokens += min(chunk.count, asked - chunk.start)

    def count_first_token(self, seconds: float) -> None:
        self.first_tokens += 1
        self.first_token_s += seconds

    def count_end(self, reason: str, seconds: float) -> None:
        self.finished[reason] += 1
        if reason in ("stop", "length"):
            self.totals += 1
            self.total_s += seconds
