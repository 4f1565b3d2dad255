"""packing.py: properties that every plan must have, and how full the bins get on real length distributions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.data.loader import plan_run
from llava_fast.data.packing import fill, plan_bins
from llava_fast.errors import ConfigError, SampleError
from tests.realdata import real_data

IMAGE_TOKENS = 576


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=200),
    bin_tokens=st.integers(100, 300),
    seed=st.integers(0, 2**32),
    window=st.integers(1, 64),
)
def test_every_sample_once_and_no_bin_too_full(lengths: list[int], bin_tokens: int, seed: int, window: int):
    bins = plan_bins(lengths, bin_tokens, seed, window)
    assert sorted(i for b in bins for i in b.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= bin_tokens for b in bins)
    again = plan_bins(np.array(lengths, np.int32), bin_tokens, seed, window)
    assert [b.tolist() for b in bins] == [b.tolist() for b in again]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_never_far_from_a_plain_best_fit(lengths: list[int], seed: int):
    """Beside a quadratic best-fit decreasing written out in full, with lengths told apart exactly."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
        rooms.append((min(fits) if fits else 64) - length)
    assert abs(len(plan_bins(lengths, 64, seed)) - len(rooms)) <= 1 + len(rooms) // 10


def test_fill():
    assert fill([np.array([0, 2]), np.array([1])], [3, 4, 5], 8) == pytest.approx(12 / 16)
    assert fill(plan_bins([], 8, 0), [], 8) == 1.0
    assert fill(plan_bins([4] * 10, 8, 0), [4] * 10, 8) == 1.0


def test_seeds():
    lengths = np.random.default_rng(0).integers(50, 900, 1000)
    plans = [[b.tolist() for b in plan_bins(lengths, 4096, seed)] for seed in (0, 1, (0, 1), (0, 2))]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    # Other company in the bins, not merely another order of the same bins.
    together = [{(i, j) for b in plan for i in b for j in b if i < j} for plan in plans[:2]]
    assert len(together[0] & together[1]) < 0.5 * len(together[0])


def test_a_bin_is_a_random_draw():
    """The mean length in a bin varies as it does in random groups of that size: no bins of long samples alone."""
    lengths = np.random.default_rng(0).lognormal(5, 0.7, 20_000).astype(int).clip(20, 2048)
    bins = plan_bins(lengths, 8192, 0)
    assert fill(bins, lengths, 8192) >= 0.99
    means = [lengths[b].mean() for b in bins]
    group = len(lengths) // len(bins)
    shuffled = np.random.default_rng(1).permutation(lengths)[: group * len(bins)].reshape(-1, group)
    assert np.std(means) < 1.3 * shuffled.mean(1).std()


def test_nothing_looks_sorted():
    lengths = np.random.default_rng(0).lognormal(6, 0.6, 30_000).astype(int).clip(20, 2048)
    bins = plan_bins(lengths, 4096, 0)
    position = np.concatenate([np.full(len(b), i) for i, b in enumerate(bins)])
    order = np.concatenate(bins)
    assert abs(np.corrcoef(position, lengths[order])[0, 1]) < 0.03  # over the epoch
    assert abs(np.corrcoef(position, order)[0, 1]) < 0.03  # nor by place in the file
    shared = [b for b in bins if len(b) > 1]
    inside = np.concatenate([np.linspace(0, 1, len(b)) for b in shared])
    assert abs(np.corrcoef(inside, lengths[np.concatenate(shared)])[0, 1]) < 0.03  # within a bin
    longest = np.array([lengths[b].max() for b in bins])
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.05  # from one bin to the next


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(real_data("tokenizer", "llama2_tokenizer.model")))


@pytest.fixture(scope="module")
def captions(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """LCS-558K as stage 1 reads it: BOS, image, caption, newline."""
    rows = json.loads(real_data("llava_pretrain", "chat.json").read_text(encoding="utf-8"))
    texts = [row["conversations"][1]["value"] + "\n" for row in rows]
    return np.array([1 + IMAGE_TOKENS + len(ids) for ids in tokenizer.encode(texts)])


@pytest.fixture(scope="module")
def problems(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """ScienceQA problems with their reasoning, about two thirds of them without a picture."""
    table = list(json.loads(real_data("scienceqa", "problems.json").read_text(encoding="utf-8")).values())
    texts = [" ".join((p["question"], p["hint"], *p["choices"], p["lecture"], p["solution"])) for p in table]
    pictures = np.array([p["image"] is not None for p in table])
    return 60 + np.array([len(ids) for ids in tokenizer.encode(texts)]) + IMAGE_TOKENS * pictures


@pytest.mark.parametrize("count", [300, 1000, 5000])
@pytest.mark.parametrize("bin_tokens", [2048, 8192])
def test_fill_on_scienceqa(problems: np.ndarray, count: int, bin_tokens: int):
    bins = plan_bins(problems[:count], bin_tokens, 0)
    assert len(bins) <= 25 or fill(bins, problems[:count], bin_tokens) >= (0.97 if bin_tokens == 8192 else 0.96)
    assert len(bins) <= math.ceil(problems[:count].sum() / bin_tokens) * 1.04 + 1


@pytest.mark.parametrize("max_tokens", [8192, 16_384])
@pytest.mark.parametrize("batch_size", [32, 128])
def test_fill_of_a_run(captions: np.ndarray, problems: np.ndarray, max_tokens: int, batch_size: int):
    """A run chooses its bins' room below ``max_tokens`` so that the data at hand fills it."""
    for lengths in (np.random.default_rng(0).choice(captions, 3000), problems, np.concatenate([captions, problems])):
        plan = plan_run(lengths, batch_size=batch_size, max_tokens=max_tokens, epochs=1, seed=0)
        assert plan.fill >= 0.97


@pytest.mark.parametrize("count", [1000, 10_000])
def test_fill_on_captions(captions: np.ndarray, count: int):
    lengths = np.random.default_rng(0).choice(captions, count)
    # Captions alone leave a bin of 8192 one sample short: 13 of them take about 7,700 tokens and hardly any 14 fit.
    bins = plan_bins(lengths, 8192, 0)
    assert len(bins) <= fewest_bins(lengths, 8192) * 1.02 + 1
    assert fill(bins, lengths, 8192) >= 0.93
    assert fill(plan_bins(lengths, 16384, 0), lengths, 16384) >= 0.95
    assert fill(plan_bins(lengths - IMAGE_TOKENS + 256, 8192, 0), lengths - IMAGE_TOKENS + 256, 8192) >= 0.97


def fewest_bins(lengths: np.ndarray, bin_tokens: int) -> int:
    """A bound that no packing can beat, where the shortest samples fill a bin with at most one more than the longest.

    At most as many bins hold the larger number as the shortest samples have room for.
    """
    ordered = np.sort(lengths)
    most = int(np.searchsorted(np.cumsum(ordered), bin_tokens, side="right"))
    totals = np.concatenate([[0], np.cumsum(ordered)])
    full = max(k for k in range(len(ordered) // most + 1) if totals[k * most] <= k * bin_tokens)
    return full + math.ceil((len(ordered) - full * most) / (most - 1))


def test_fill_on_a_mix(captions: np.ndarray, problems: np.ndarray):
    lengths = np.concatenate([captions, problems[:300]])
    assert fill(plan_bins(lengths, 8192, 0), lengths, 8192) >= 0.96


def test_errors():
    with pytest.raises(SampleError, match="'2': has 9 tokens, more than a bin of 8") as caught:
        plan_bins([1, 8, 9, 10], 8, 0)
    assert caught.value.sample_id == "2"
    for bad in (0, -4):
        with pytest.raises(SampleError, match=rf"'1': has {bad} tokens"):
            plan_bins([3, bad], 8, 0)
    with pytest.raises(ConfigError, match="bin_tokens=0"):
        plan_bins([1], 0, 0)
    with pytest.raises(ConfigError, match="window=0"):
        plan_bins([1], 8, 0, window=0)
    with pytest.raises(ConfigError, match="whole number"):
        plan_bins([1.5], 8, 0)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="whole number"):
        plan_bins(np.ones((2, 2), int), 8, 0)
