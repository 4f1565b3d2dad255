"""Packing: which samples share a bin of tokens, so that hardly any of a batch's room stays empty."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from llava_fast.errors import ConfigError, SampleError

_STEPS = 16  # lengths are told apart in steps of 1/16 of a doubling; the shuffled order decides between equals


def plan_bins(
    lengths: Sequence[int] | np.ndarray, bin_tokens: int, seed: int | Sequence[int], window: int = 16_384
) -> list[np.ndarray]:
    """Puts samples of known length into bins of at most ``bin_tokens`` tokens, every sample once.

    Samples are shuffled and cut into windows. A window gets as many bins as its tokens need, and from the longest
    sample to the shortest each goes into the emptiest bin. So the short ones fill up what the long ones leave, and
    every bin holds its share of both: the gradient of a bin is not of long samples or of short ones alone.

    Args:
        lengths: (N,) tokens of each sample, image tokens included.
        bin_tokens: the room of a bin.
        seed: the same seed gives the same plan; (seed, epoch) gives every epoch its own.
        window: samples that are packed together. More pack tighter.

    Returns:
        The bins, in shuffled order: int64 arrays of sample indices, in shuffled order too.

    Raises:
        ConfigError: ``bin_tokens`` or ``window`` is not positive, or ``lengths`` is not a list of whole numbers.
        SampleError: a sample is longer than a bin, or has no tokens; its id is its index.
    """
    if bin_tokens <= 0 or window <= 0:
        raise ConfigError(f"bin_tokens={bin_tokens} and window={window} must be above 0")
    sizes = _check_lengths(lengths, bin_tokens)
    random = np.random.default_rng(seed)
    order = random.permutation(len(sizes))
    bins: list[np.ndarray] = []
    for start in range(0, len(order), window):
        members = order[start : start + window]
        bins += [members[places] for places in _emptiest_first(sizes[members], bin_tokens, random)]
    return [random.permutation(bins[i]) for i in random.permutation(len(bins))]


def fill(bins: Sequence[np.ndarray], lengths: Sequence[int] | np.ndarray, bin_tokens: int) -> float:
    """The share of the bins' room that holds tokens, 0 to 1; 1.0 when there is no bin."""
    if not bins:
        return 1.0
    return float(np.asarray(lengths)[np.concatenate(bins)].sum() / (len(bins) * bin_tokens))


def _check_lengths(lengths: Sequence[int] | np.ndarray, bin_tokens: int) -> np.ndarray:
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or (sizes.size and sizes.dtype.kind not in "iu"):
        raise ConfigError(f"lengths must be one whole number a sample, found shape {sizes.shape} of {sizes.dtype}")
    for index in np.flatnonzero((sizes > bin_tokens) | (sizes <= 0))[:1].tolist():
        if sizes[index] <= 0:
            raise SampleError(str(index), f"has {sizes[index]} tokens; leave it out")
        raise SampleError(
            str(index),
            f"has {sizes[index]} tokens, more than a bin of {bin_tokens}; raise bin_tokens or cut the sample",
        )
    return sizes.astype(np.int64)


def _emptiest_first(sizes: np.ndarray, bin_tokens: int, random: np.random.Generator) -> list[list[int]]:
    """Bins of positions in ``sizes``, balanced (longest processing time first; Graham, 1969)."""
    # Lengths within a few percent count as equal, or small data sets would share their bins alike in every epoch.
    longest_first = np.argsort(-sizes * random.uniform(0.96, 1.04, len(sizes)))
    bins: list[list[int]] = [[] for _ in range(-(-int(sizes.sum()) // bin_tokens))]
    used = [(0, number) for number in range(len(bins))]  # a heap: the emptiest bin first
    for position, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        tokens, number = used[0]
        if tokens + size <= bin_tokens:
            heapq.heapreplace(used, (tokens + size, number))
        else:
            number = len(bins)
            bins.append([])
            heapq.heappush(used, (size, number))
        bins[number].append(position)
    return bins
