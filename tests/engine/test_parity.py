"""The engine against transformers' ``generate``, run one by one: exactly the same greedy tokens."""

from __future__ import annotations

import numpy as np
import pytest

import llava_fast as lf
from tests.engine.conftest import picture, prompt

BLOCK = 8
TIGHT = {  # room for about one and a half of the longest requests: preemption, chunks and eviction must happen
    "block_size": BLOCK,
    "max_step_tokens": 96,
    "kv_cache_bytes": 90
    * BLOCK
    * 2
    * 2
    * 2
    * 16
    * 4,  # blocks, tokens, keys and values, layers, heads, head size, float32
}


def requests(count: int) -> list[lf.Request]:
    """Text alone, one to three images, prompts of 1 to 400 tokens, a third of them with a beginning in common."""
    rng = np.random.default_rng(7)
    pictures = [picture(rng, 28 + i) for i in range(12)]
    common, seen = prompt(rng, 40), pictures[0]
    made = []
    for number in range(count):
        sampling = lf.SamplingParams(max_tokens=int(rng.integers(1, 25)))
        if number % 3 == 0:
            ids, images = common + [4] * (number % 2) + prompt(rng, 1 + number % 30)[1:], [seen] * (number % 2)
        else:
            images = [pictures[i] for i in rng.integers(0, len(pictures), rng.integers(0, 4))]
            ids = prompt(rng, int(rng.choice([0, 1, 7, 30, 60, 120, 399])), len(images))
        made.append(lf.Request(token_ids=ids, images=images, sampling=sampling))
    return made


@pytest.fixture(scope="module")
def expected(pair):
    return [(request, pair.reference(request)) for request in requests(200)]


@pytest.mark.parametrize("cached", [True, False], ids=["caches", "no caches"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_two_hundred_requests_under_a_small_cache(pair, expected, cached, lookahead):
    off = {} if cached else {"prefix_caching": False, "feature_cache_bytes": 0}
    with pair.engine(**TIGHT, **off, lookahead=lookahead, max_queue=50) as engine:
        completions = engine.generate([request for request, _ in expected])
        stats = engine.stats()
    wrong = [i for i, (c, (_, tokens)) in enumerate(zip(completions, expected, strict=True)) if c.token_ids != tokens]
    assert not wrong
    assert stats.preemptions > 0 and stats.steps > 200
    assert stats.blocks_held == stats.running == stats.waiting == 0
    if cached:
        assert stats.cached_tokens > 0 and stats.image_hits > 0 and stats.blocks_cached < stats.prompt_tokens // BLOCK
    else:
        assert stats.image_hits == 0
