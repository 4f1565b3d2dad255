"""From samples to packed batches: lengths measured once, bins planned, batches made lazily in worker processes."""

from __future__ import annotations

import atexit
import hashlib
import math
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from llava_fast.batch import PackedBatch
from llava_fast.config import IGNORE
from llava_fast.data.packing import fill, plan_bins
from llava_fast.errors import ImageError, LlavaError, SampleError
from llava_fast.processor import Encoded, Processor

Bad = tuple[str, str]  # (sample id, why it cannot be used)


class SampleSource(Protocol):
    """A lazy sequence of samples in the LLaVA JSON form."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class EncodeOptions:
    """How conversations become tokens and labels; see :meth:`llava_fast.processor.Processor.encode`."""

    mask: str = "answers"
    image_position: str = "as_written"
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """What every optimizer step of a run will read: a list of bins a step, each (epoch, sample indices).

    Attributes:
        steps: steps[i] is the list of bins of step i.
        bin_tokens: capacity of a bin.
        fill: share of all bins' capacity that holds tokens.
    """

    steps: list[list[tuple[int, np.ndarray]]]
    bin_tokens: int
    fill: float


class Sizes(Dataset):
    """Sample index -> its tokens (0 when it cannot be used), supervised tokens and images; and why it cannot be used.

    A random image place is measured as the first one; the other can differ by a few tokens, which bins can bear.
    """

    def __init__(self, samples: SampleSource, processor: Processor, options: EncodeOptions):
        self.samples, self.processor = samples, processor
        position = "first" if options.image_position == "random" else options.image_position
        self.options = EncodeOptions(options.mask, position, options.seed)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[tuple[int, int, int], Bad | None]:
        try:
            encoded = self.processor.encode(self.samples[index], **vars(self.options))
        except SampleError as error:
            return (0, 0, 0), (error.sample_id, error.message)
        supervised = int((encoded.labels != IGNORE).sum())
        return (len(encoded.input_ids), supervised, len(encoded.images)), None


def measure(
    samples: SampleSource, processor: Processor, options: EncodeOptions, workers: int = 0
) -> tuple[np.ndarray, list[Bad]]:
    """Token lengths of all samples, (n,) int64 with 0 where a sample cannot be used, and the list of those."""
    sizes, bad = measure_sizes(samples, processor, options, workers)
    return sizes[:, 0], bad


def measure_sizes(
    samples: SampleSource,
    processor: Processor,
    options: EncodeOptions,
    workers: int = 0,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[np.ndarray, list[Bad]]:
    """Tokens, supervised tokens and images of each sample, (n, 3) int64, all 0 where it cannot be used; and those.

    Of several ``ranks`` each measures its share: every ranks-th sample from ``rank`` on. A bar tells of rank 0's.
    """
    mine = range(rank, len(samples), ranks)
    loader = DataLoader(
        Subset(Sizes(samples, processor, options), mine),
        batch_size=64,
        collate_fn=list,
        num_workers=workers if len(mine) > 2000 else 0,
        worker_init_fn=_leave_interrupts_to_parent,
    )
    bar = tqdm(total=len(mine), desc="tokenizing", unit="sample", leave=False, delay=2, disable=rank != 0)
    sizes: list[tuple[int, int, int]] = []
    bad: list[Bad] = []
    for rows in _started(loader):
        sizes += [size for size, _ in rows]
        bad += [fault for _, fault in rows if fault]
        bar.update(len(rows))
    bar.close()
    return np.array(sizes, dtype=np.int64).reshape(-1, 3), bad


def plan_run(lengths: np.ndarray, *, batch_size: int, max_tokens: int, epochs: int, seed: int) -> Plan:
    """Pack every epoch anew and group the bins into as many optimizer steps as batches of ``batch_size`` would be.

    A step then holds ``batch_size`` samples on average, so that a recipe's batch size means what its author meant.
    ``max_tokens`` is what fits the memory; the bins are made smaller where that fills them better.

    Raises:
        LlavaError: no usable sample, or one that is longer than ``max_tokens``.
    """
    usable = np.flatnonzero(lengths)
    if not len(usable):
        raise LlavaError("no usable sample in the training data")
    if lengths.max() > max_tokens:
        raise LlavaError(
            f"the longest sample has {lengths.max()} tokens and max_tokens is {max_tokens}; "
            f"raise --max-tokens or lower --max-length"
        )
    sizes = lengths[usable]
    steps_an_epoch = max(1, round(len(usable) / batch_size))
    bin_tokens = choose_bin_tokens(sizes, sizes.sum() / steps_an_epoch, max_tokens, seed)
    steps = []
    capacity = 0
    for epoch in range(epochs):
        bins = [(epoch, usable[b]) for b in plan_bins(sizes, bin_tokens, seed=seed + 7919 * epoch)]
        capacity += bin_tokens * len(bins)
        bounds = np.linspace(0, len(bins), min(steps_an_epoch, len(bins)) + 1).round().astype(int)
        steps += [bins[i:j] for i, j in pairwise(bounds)]
    return Plan(steps, bin_tokens, int(sizes.sum()) * epochs / capacity)


def choose_bin_tokens(sizes: np.ndarray, tokens_a_step: float, max_tokens: int, seed: int) -> int:
    """A capacity of at most ``max_tokens`` that a step's tokens fill to 97%, the largest first; else the best tried.

    Samples of much the same length leave a gap at the end of a bin that only another capacity closes.
    """
    sample = np.random.default_rng(seed).permutation(sizes)[:20_000]
    best = (0.0, max_tokens)
    fewest = math.ceil(tokens_a_step / max_tokens)
    for count in range(fewest, fewest + 3):
        for slack in (0.003, 0.01, 0.02, 0.03):
            wanted = max(int(sizes.max()), int(tokens_a_step / count * (1 + slack)) + 1)
            capacity = min(max_tokens, wanted)
            share = fill(plan_bins(sample, capacity, seed=seed), sample, capacity)
            if share >= 0.97:
                return capacity
            best = max(best, (share, capacity))
    return best[1]


class Bins(Dataset):
    """Bin number -> (PackedBatch or None when every sample in it is bad, the bad ones). Decodes images."""

    def __init__(
        self,
        samples: SampleSource,
        processor: Processor,
        bins: list[tuple[int, np.ndarray]],
        options: EncodeOptions,
    ):
        self.samples, self.processor, self.bins, self.options = samples, processor, bins, options

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, number: int) -> tuple[PackedBatch | None, list[Bad]]:
        epoch, indices = self.bins[number]
        good: list[Encoded] = []
        bad: list[Bad] = []
        for index in indices:
            try:
                good.append(self.processor.encode(self.samples[int(index)], epoch=epoch, **vars(self.options)))
            except SampleError as error:
                bad.append((error.sample_id, error.message))
        try:
            return (self.processor.collate(good) if good else None), bad
        except ImageError:
            whole, broken = self._sort_out(good)
            return (self.processor.collate(whole) if whole else None), bad + broken

    def _sort_out(self, encoded: list[Encoded]) -> tuple[list[Encoded], list[Bad]]:
        """Those whose images can all be read, and the others. Reads them a second time: bad images are rare."""
        whole, broken = [], []
        for one in encoded:
            try:
                for source in one.images:
                    self.processor.image(source)
                whole.append(one)
            except ImageError as error:
                broken.append((one.sample_id, str(error)))
        return whole, broken


def load_steps(
    samples: SampleSource,
    processor: Processor,
    plan: Plan,
    options: EncodeOptions,
    *,
    start: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[list[PackedBatch], list[Bad]]]:
    """The batches of step ``start`` and every later one, in the plan's order, prefetched by ``workers`` processes."""
    sizes = [len(bins) for bins in plan.steps[start:]]
    bins = [b for step in plan.steps[start:] for b in step]
    loader = DataLoader(
        Bins(samples, processor, bins, options),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_interrupts_to_parent,
        generator=torch.Generator(),  # of its own, so that loading draws nothing from the global one
        pin_memory=pin_memory,
    )
    stream = _started(loader)
    for size in sizes:
        loaded = [next(stream) for _ in range(size)]
        batches = [batch for batch, _ in loaded if batch is not None and batch.num_supervised]
        yield batches, [fault for _, faults in loaded for fault in faults]


def fingerprint(lengths: np.ndarray) -> str:
    """A short hash that tells whether two runs read the same data."""
    return hashlib.sha256(lengths.tobytes()).hexdigest()[:16]


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _started(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, whose workers end with this process even after an error that nobody caught.

    Such an error keeps the iterator alive, and multiprocessing would wait for workers that ignore its SIGTERM.
    """
    before = set(active_children())
    stream = iter(loader)
    _workers.update(set(active_children()) - before)
    return stream


@atexit.register  # runs before multiprocessing's own, which was registered when it was imported
def _end_workers() -> None:
    for process in active_children():
        if process in _workers:
            process.kill()


def _leave_interrupts_to_parent(worker: int) -> None:
    """Signals to the whole group are the main process's to obey; a worker ends when that one does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
