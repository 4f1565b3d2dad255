"""What an engine launches, compiled into Triton's own cache ahead of time, with no GPU present.

Triton looks a kernel up by its source, its arguments' types, which of them are multiples of 16, and the constants that
the launcher chose. None of this is written down here a second time: the launchers themselves run, on tensors whose
contents do not matter, while Triton takes the card for present and is stopped before it compiles.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llava_kernels.attention import paged_attention, rope_store_kv, store_kv
from llava_kernels.dispatch import implementation
from llava_kernels.linear_gelu import linear_gelu
from llava_kernels.project_splice import project_splice
from llava_kernels.rms_norm import add_rms_norm, rms_norm
from llava_kernels.rope import rope
from llava_kernels.sample import sample
from llava_kernels.swiglu import swiglu
from llava_kernels.tiles import assume

Wanted = tuple[str, str, str]  # a kernel's module and name, and what Triton calls its specialization, as JSON


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Those of a model in bfloat16 and of its engine that decide what is launched."""

    hidden: int
    inner: int  # of the decoder's MLP
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 32064
    vision: int = 1024  # width of the image features
    block_size: int = 16  # tokens of a block of the cache
    cache: torch.dtype = torch.bfloat16  # or float8_e4m3fn
    context: int = 4096  # tokens of the longest sequence


LLAVA_7B = Sizes(hidden=4096, inner=11008, heads=32, kv_heads=32)
LLAVA_13B = Sizes(hidden=5120, inner=13824, heads=40, kv_heads=40)


def fill(folder: Path, archs: Sequence[int], only: str = "", workers: int = 1) -> tuple[int, list[str]]:
    """Compile what LLaVA-1.5 7B and 13B launch while they answer into Triton's cache in ``folder``.

    A process finds it there that runs with TRITON_CACHE_DIR=folder, the same release of Triton and the same sources.
    Triton notes absolute paths: a folder that was moved is of no use. What Triton itself has built by the system's C
    compiler at its first launch, and Triton 3.6 at each kernel's, is not in it.

    Args:
        folder: made if it is not there. What it holds already is kept, and not compiled again.
        archs: 80, 90.
        only: kernels whose function's name matches this regular expression.
        workers: processes that compile.

    Returns:
        How many kernels it holds for these launches, and what is to be said of those that do not compile.
    """
    # Spawned, not forked: torch has threads by now.
    with ProcessPoolExecutor(workers, get_context("spawn"), _compile_into, (str(folder.resolve()),)) as pool:
        jobs = [
            (one, arch)
            for arch in archs
            for one in dict.fromkeys(chain.from_iterable(pool.map(wanted, repeat(arch), (LLAVA_7B, LLAVA_13B))))
            if re.search(only, one[1])
        ]
        failures = [words for words in pool.map(compile_wanted, *zip(*jobs, strict=True)) if words] if jobs else []
    return len(jobs) - len(failures), failures


def _compile_into(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def wanted(arch: int, sizes: Sizes) -> list[Wanted]:
    """All that answering takes: decoding any number of sequences, prompts whole or from 512 tokens a chunk, images,
    drawing with and without top-k and top-p. Quantized weights, penalties and training are not among it."""
    found: dict[Wanted, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # do not compile, do not launch

    with on_card(arch), implementation("triton"), torch.inference_mode():
        knobs.runtime.jit_cache_hook = note
        try:
            launch_all(sizes)
        finally:
            knobs.runtime.jit_cache_hook = None
    return list(found)


def compile_wanted(one: Wanted, arch: int) -> str | None:
    """Into Triton's cache, if it is not there. Of a failure, the words."""
    module, name, specialization = one
    try:
        with on_card(arch):
            getattr(importlib.import_module(module), name).preload(specialization)
    except Exception as error:
        return f"{name} does not compile for sm_{arch}: {type(error).__name__}: {error}"
    return None


@contextmanager
def on_card(arch: int) -> Iterator[None]:
    """Within the block, launchers and Triton take a card of this architecture for present; none can be launched on."""
    before = driver._active  # driver.active would look for a card
    driver.set_active(Card(arch))
    try:
        with assume(arch):
            yield
    finally:
        driver._active = before


class Card:
    """What Triton asks its driver up to a launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # a kernel remembers the target of each device, so each target has a device of its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def launch_all(sizes: Sizes) -> None:
    """The launches of an engine's steps, on tensors laid out as the engine's are."""
    for tokens in (1, 1024):
        _layer(sizes, tokens)
    caches = _caches(sizes)
    for sequences in range(1, 33):  # more are not split, as 32 already are not
        for context in range(128, sizes.context + 1, 128):
            _attend(sizes, caches, sequences, 1, context)
    for queries in (512, 2048):
        for sequences in range(1, 5):
            _attend(sizes, caches, sequences, queries, sizes.context)
    _prompt(sizes, caches)
    for image_rows in (576, 5 * 576):
        _images(sizes, image_rows)
    _draw(sizes)


def _empty(*shape: int) -> Tensor:
    """No memory is taken before it is written."""
    return torch.empty(shape, dtype=torch.bfloat16)


def _caches(sizes: Sizes) -> tuple[Tensor, Tensor]:
    both = torch.empty(64, sizes.block_size, 2, sizes.kv_heads, sizes.head_dim, dtype=sizes.cache)
    return both[:, :, 0], both[:, :, 1]


def _qkv(sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor]:
    """The merged product, and angles that serve for cosines and sines."""
    merged = _empty(tokens, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
    return merged, torch.empty(tokens, sizes.head_dim // 2)


def _layer(sizes: Sizes, tokens: int) -> None:
    x, weight = _empty(tokens, sizes.hidden), _empty(sizes.hidden)
    rms_norm(x, weight, 1e-5)
    add_rms_norm(x, x, weight, 1e-5)
    swiglu(_empty(tokens, 2 * sizes.inner))


def _attend(sizes: Sizes, caches: tuple[Tensor, Tensor], sequences: int, queries: int, context: int) -> None:
    q = _qkv(sizes, sequences * queries)[0][:, : sizes.heads]
    table = torch.empty(sequences, -(-context // sizes.block_size), dtype=torch.int32)
    lens, starts = (torch.empty(sequences + i, dtype=torch.int32) for i in (0, 1))
    paged_attention(q, *caches, table, lens, starts, max_query=queries, max_context=context)


def _prompt(sizes: Sizes, caches: tuple[Tensor, Tensor]) -> None:
    tokens, heads, kv_heads = 1024, sizes.heads, sizes.kv_heads
    slots = torch.empty(tokens, dtype=torch.int64)
    qkv, angles = _qkv(sizes, tokens)
    rope_store_kv(qkv, angles, angles, *caches, slots, heads=heads)
    turned = rope(qkv[:, : heads + kv_heads], angles, angles)
    q, k, v = turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]
    store_kv(k, v, *caches, slots)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    torch.ops.llava_kernels.varlen_attention(q, k, v, starts, tokens, True)


def _images(sizes: Sizes, rows: int) -> None:
    """The two-layer projector of LLaVA-1.5 on ``rows`` image rows among 100 text rows."""
    bias = _empty(sizes.hidden)
    features = linear_gelu(_empty(1, rows, sizes.vision), _empty(sizes.hidden, sizes.vision), bias)
    places = torch.empty(rows, dtype=torch.int32), torch.empty(100, dtype=torch.int32)
    ids, table = torch.empty(rows + 100, dtype=torch.int64), _empty(sizes.vocab, sizes.hidden)
    project_splice(features, _empty(sizes.hidden, sizes.hidden), bias, table, ids, *places)


def _draw(sizes: Sizes) -> None:
    ids, setting = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    top_k, top_p = {"top_k": torch.ones(2, dtype=torch.int32)}, {"top_p": setting}
    for filters in ({}, top_k, top_p, top_k | top_p):
        sample(_empty(2, sizes.vocab), seeds=ids, positions=ids, temperature=setting, **filters)
