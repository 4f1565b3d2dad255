"""PlainSteps: decoding on a CPU by one call of the C library a step, in memory that is made once."""

from __future__ import annotations

from ctypes import addressof, c_int64

import numpy as np
from torch import Tensor

from llava_fast.engine.inputs import BlockTables
from llava_fast.engine.native_decoder import NativeDecoder
from llava_fast.engine.sampler import Sampler
from llava_fast.engine.scheduler import Chunk
from llava_kernels import library
from llava_kernels.dispatch import chosen
from llava_kernels.native_sample import SampleArgs


class PlainSteps:
    """Steps in which every sequence decodes one token, draws it and tells nothing about it; no token is favoured.

    The weights, which a step reads from end to end, push the rest of the process out of the caches. What follows runs
    cold: a call into torch then takes several times as long as in a loop of its own, and one into numpy 15 us.

    Args:
        decoder: whose steps they are.
        embedding: (V, D) float32 or bfloat16, on the CPU.
        sampler: has the token that each row drew last.
        tables: of the sequences' blocks.
    """

    def __init__(self, decoder: NativeDecoder, embedding: Tensor, sampler: Sampler, tables: BlockTables):
        rows, blocks = tables.array.shape
        self._decoder, self._sampler, self._tables = decoder, sampler, tables
        self._embedding = embedding.detach().contiguous()  # kept: the library has its address alone
        self._last = (c_int64 * len(sampler.last)).from_address(sampler.last.data_ptr())
        of_rows = c_int64 * rows
        self._rows, self._computed, self._tokens = of_rows(), of_rows(), of_rows()
        self._logits = np.empty((rows, decoder.vocab_size), dtype=np.float32)  # no memory until it is written
        self._args = library.NextArgs(
            dtype=library.DTYPES[embedding.dtype],
            embedding=self._embedding.data_ptr(),
            vocabulary=len(embedding),
            rows=addressof(self._rows),
            computed=addressof(self._computed),
            table_rows=rows,
            last=addressof(self._last),
            block_table=tables.array.ctypes.data,
            table_stride=blocks,
            tokens=addressof(self._tokens),
        )

    @staticmethod
    def fit(chunks: list[Chunk]) -> bool:
        """Not where Triton's kernels are asked for, which the model's own modules run."""
        return all(chunk.sequence.on_device and chunk.sequence.simple for chunk in chunks) and chosen() != "triton"

    def __call__(self, chunks: list[Chunk]) -> list[int]:
        """The next token of each sequence."""
        self._tables.update(chunks)
        plain = True
        for i, chunk in enumerate(chunks):
            sequence = chunk.sequence
            self._rows[i], self._computed[i] = sequence.slot, chunk.start
            plain = plain and sequence.plain
        count = self._args.sequences = len(chunks)
        self._args.logits = None if plain else self._logits.ctypes.data
        self._decoder.next(self._args)
        if not plain:
            self._draw(count, any(chunk.sequence.sampling.penalizes for chunk in chunks))
        tokens = self._tokens[:count]
        for row, token in zip(self._rows, tokens, strict=False):
            self._last[row] = token
        return tokens

    def _draw(self, count: int, penalised: bool) -> None:
        rows = np.array(self._rows[:count])
        positions = np.array(self._computed[:count]) + 1  # of what is drawn
        settings, seeds = self._sampler.settings_of(rows)
        top_k = settings["top_k"].astype(np.int32)
        args = SampleArgs(
            rows=count,
            vocabulary=self._logits.shape[1],
            logits=self._logits.ctypes.data,
            seeds=seeds.ctypes.data,
            positions=positions.ctypes.data,
            temperature=settings["temperature"].ctypes.data,
            top_k=top_k.ctypes.data,
            top_p=settings["top_p"].ctypes.data,
            min_p=settings["min_p"].ctypes.data,
            ids=addressof(self._tokens),
        )
        if penalised:
            counts, in_prompt = self._sampler.seen()
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
                setattr(args, name, settings[name].ctypes.data)
            args.counts, args.in_prompt, args.table_rows = counts.ctypes.data, in_prompt.ctypes.data, rows.ctypes.data
        self._decoder.handle.sample(args)
        if penalised:
            counts[rows, self._tokens[:count]] += 1
