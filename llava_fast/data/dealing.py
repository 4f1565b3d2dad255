"""Dealing: the samples of each optimizer step shared among ranks, so that all have the same work at the same time.

A rank that is done early waits: sharded layers are gathered by all ranks together. So what is made equal is the work of
each forward pass, in operations, and not only the number of tokens. Which samples a step holds does not depend on the
number of ranks; so neither does what is learned.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from llava_fast.data.loader import Plan


@dataclass(frozen=True)
class Share:
    """What one rank reads, and how even the shares are.

    Attributes:
        plan: of this rank; a step has as many bins here as on every other rank, some of them maybe without a sample.
        fill: tokens of an average bin over those of the fullest bin of its pass, averaged over passes; 1.0 is even.
        spread: work of the dearest bin of a pass over that of an average one, averaged over passes; 1.0 is even.
    """

    plan: Plan
    fill: float
    spread: float


def deal(plan: Plan, tokens: np.ndarray, costs: np.ndarray, *, rank: int, ranks: int, max_tokens: int) -> Share:
    """The share of ``rank`` in every step of ``plan``.

    Args:
        plan: steps as lists of bins of (epoch, sample indices); its bins are dissolved.
        tokens: (n,) of each sample; none is longer than ``max_tokens``.
        costs: (n,) work of each sample, in any unit.
        rank, ranks: whose share, and of how many.
        max_tokens: the room of a bin: one forward pass.
    """
    steps, fills, spreads = [], [], []
    for step in plan.steps:
        epoch = step[0][0]
        samples = np.concatenate([indices for _, indices in step])
        passes = deal_step(samples, tokens, costs, ranks=ranks, max_tokens=max_tokens)
        steps.append([(epoch, bins[rank]) for bins in passes])
        for bins in passes:
            held = np.array([tokens[b].sum() for b in bins], dtype=np.float64)
            work = np.array([costs[b].sum() for b in bins], dtype=np.float64)
            fills.append(held.mean() / held.max())
            spreads.append(work.max() / work.mean())
    return Share(Plan(steps, max_tokens, plan.fill), float(np.mean(fills)), float(np.mean(spreads)))


def deal_step(
    samples: np.ndarray, tokens: np.ndarray, costs: np.ndarray, *, ranks: int, max_tokens: int
) -> list[list[np.ndarray]]:
    """passes[i][r]: the samples of rank r in forward pass i, as few passes as there is room for.

    From the dearest sample to the cheapest, each goes into the bin with the least work that has room for it (longest
    processing time first; Graham, 1969). Bins of like work then make a pass.
    """
    count = max(1, math.ceil(tokens[samples].sum() / (ranks * max_tokens)))
    while (bins := _balanced(samples, tokens, costs, count * ranks, max_tokens)) is None:
        count += 1
    bins.sort(key=lambda b: -costs[b].sum())
    passes: list[list[np.ndarray]] = []
    done = np.zeros(ranks)  # work of each rank so far
    for i in range(count):
        row = bins[i * ranks : (i + 1) * ranks]
        least_first = np.argsort(done, kind="stable")  # who had the least so far takes the dearest of this pass
        placed = dict(zip(least_first.tolist(), row, strict=True))
        passes.append([placed[rank] for rank in range(ranks)])
        done += [costs[placed[rank]].sum() for rank in range(ranks)]
    return passes


def _balanced(
    samples: np.ndarray, tokens: np.ndarray, costs: np.ndarray, count: int, max_tokens: int
) -> list[np.ndarray] | None:
    """``count`` bins of like work, or None when a sample finds no room."""
    dearest_first = samples[np.argsort(-costs[samples], kind="stable")]
    bins: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    heap = [(0.0, number) for number in range(count)]  # the bin with the least work first
    for sample, size, cost in zip(
        dearest_first.tolist(), tokens[dearest_first].tolist(), costs[dearest_first].tolist(), strict=True
    ):
        passed_over = []
        while heap and used[heap[0][1]] + size > max_tokens:
            passed_over.append(heapq.heappop(heap))
        if not heap:
            return None
        work, number = heap[0]
        heapq.heapreplace(heap, (work + cost, number))
        bins[number].append(sample)
        used[number] += size
        for entry in passed_over:
            heapq.heappush(heap, entry)
    return [np.array(b, dtype=np.int64) for b in bins]
