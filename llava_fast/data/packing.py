"""Packing: which samples share a bin of tokens, so that hardly any of a batch's room stays empty."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from llava_fast.errors import ConfigError, SampleError

_STEPS = 16  # lengths are told apart in steps of 1/16 of a doubling; the shuffled order decides between equals
_BIN_BITS = 32  # a bin's free room and its number share one integer: room << 32 | number


def plan_bins(
    lengths: Sequence[int] | np.ndarray, bin_tokens: int, seed: int | Sequence[int], window: int = 8192
) -> list[np.ndarray]:
    """Puts samples of known length into bins of at most ``bin_tokens`` tokens, every sample once.

    Samples are shuffled and cut into windows. Inside a window the longest sample goes first, each into the fullest bin
    that still has room for it (best-fit decreasing). Windows, and lengths within 4% counting as equal, keep what shares
    a bin random from epoch to epoch. At the end the bins are shuffled, and the samples within each, so nothing is
    sorted by length.

    Args:
        lengths: (N,) tokens of each sample, image tokens included.
        bin_tokens: the room of a bin.
        seed: the same seed gives the same plan; (seed, epoch) gives every epoch its own.
        window: samples that are packed together. More pack tighter.

    Returns:
        The bins: int64 arrays of sample indices.

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
        bins += [random.permutation(members[b]) for b in _best_fit_decreasing(sizes[members], bin_tokens)]
    return [bins[i] for i in random.permutation(len(bins))]


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


def _best_fit_decreasing(sizes: np.ndarray, bin_tokens: int) -> list[list[int]]:
    """Bins of positions in ``sizes``, the longest sample first."""
    longest_first = np.argsort(-np.floor(np.log2(sizes) * _STEPS), kind="stable")
    bins: list[list[int]] = []
    rooms: list[int] = []  # sorted; the bins that are not full
    for position, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        fit = bisect_left(rooms, size << _BIN_BITS)  # the least room that is enough
        if fit < len(rooms):
            key = rooms.pop(fit)
            room, number = key >> _BIN_BITS, key & ((1 << _BIN_BITS) - 1)
        else:
            room, number = bin_tokens, len(bins)
            bins.append([])
        bins[number].append(position)
        if room > size:
            insort(rooms, (room - size) << _BIN_BITS | number)
    return bins
