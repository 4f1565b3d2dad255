"""PlainSteps: decoding on a CPU with numpy and the C library alone, in memory that is made once."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from llava_fast.engine.inputs import BlockTables
from llava_fast.engine.native_decoder import NativeDecoder
from llava_fast.engine.sampler import Sampler
from llava_fast.engine.scheduler import Chunk
from llava_fast.engine.transfer import as_array
from llava_kernels import library
from llava_kernels.dispatch import chosen
from llava_kernels.native_sample import SampleArgs


class PlainSteps:
    """Steps in which every sequence decodes one token, draws it and tells nothing about it; no token is favoured.

    The weights, which a step reads from end to end, push the rest of the process out of the caches. What follows runs
    cold: a call into torch then takes several times as long as in a loop of its own, and a step had fifteen.

    Args:
        decoder: whose steps they are.
        embedding: (V, D) float32 or bfloat16, on the CPU.
        sampler: has the token that each row drew last.
        tables: of the sequences' blocks.
        block_size: tokens a block.
    """

    def __init__(
        self, decoder: NativeDecoder, embedding: Tensor, sampler: Sampler, tables: BlockTables, block_size: int
    ):
        (rows, blocks), width = tables.array.shape, embedding.shape[1]
        self._decoder, self._sampler, self._last = decoder, sampler, sampler.last.numpy()
        self._tables, self._block_size = tables, block_size
        self._embedding = as_array(embedding)
        self._x = np.empty((rows, width), dtype=self._embedding.dtype)
        self._hidden = np.empty((rows, width), dtype=np.float32)
        self._tokens = np.empty(rows, dtype=np.int64)
        self._position_ids = np.zeros(rows, dtype=np.int32)
        self._slots = np.zeros(rows, dtype=np.int64)
        self._block_table = np.zeros((rows, blocks), dtype=np.int32)
        self._context_lens = np.zeros(rows, dtype=np.int32)
        self._query_start = np.arange(rows + 1, dtype=np.int32)
        self._args = library.StepArgs(
            dtype=library.DTYPES[embedding.dtype],
            x=self._x.ctypes.data,
            positions=self._position_ids.ctypes.data,
            slots=self._slots.ctypes.data,
            block_table=self._block_table.ctypes.data,
            table_stride=blocks,
            context_lens=self._context_lens.ctypes.data,
            query_start=self._query_start.ctypes.data,
            hidden=self._hidden.ctypes.data,
        )
        self._logits = np.empty((rows, decoder.vocab_size), dtype=np.float32)  # no memory until it is written
        self._addresses = self._hidden.ctypes.data, self._tokens.ctypes.data

    @staticmethod
    def fit(chunks: list[Chunk]) -> bool:
        """Not where Triton's kernels are asked for, which the model's own modules run."""
        return chosen() != "triton" and all(chunk.sequence.on_device and chunk.sequence.simple for chunk in chunks)

    def __call__(self, chunks: list[Chunk]) -> np.ndarray:
        """The next token of each sequence: (S,) int64."""
        self._tables.update(chunks)
        count, last, size = len(chunks), self._last, self._block_size
        rows = np.array([chunk.sequence.slot for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        blocks = starts // size
        held = int(blocks.max()) + 1
        self._embedding.take(last[rows], axis=0, out=self._x[:count], mode="clip")  # "raise" would make a copy first
        self._position_ids[:count] = starts
        self._context_lens[:count] = starts + 1
        self._block_table[:count, :held] = self._tables.array[rows, :held]
        self._slots[:count] = self._block_table[np.arange(count), blocks] * size + starts % size
        self._args.tokens = self._args.sequences = count
        self._decoder.run(self._args)
        if all(chunk.sequence.plain for chunk in chunks):
            self._decoder.likeliest(count, *self._addresses)
        else:
            self._draw(rows, starts + 1, any(chunk.sequence.sampling.penalizes for chunk in chunks))
        last[rows] = self._tokens[:count]
        return self._tokens[:count].copy()

    def _draw(self, rows: np.ndarray, positions: np.ndarray, penalised: bool) -> None:
        """rows: (S,) int64, of the sampler's tables; positions: (S,) int64, the places of what is drawn."""
        count, (hidden, tokens), logits = len(rows), self._addresses, self._logits.ctypes.data
        self._decoder.write_logits(count, hidden, logits)
        settings, seeds = self._sampler.settings_of(rows)
        top_k = settings["top_k"].astype(np.int32)
        args = SampleArgs(
            rows=count,
            vocabulary=self._logits.shape[1],
            logits=logits,
            seeds=seeds.ctypes.data,
            positions=positions.ctypes.data,
            temperature=settings["temperature"].ctypes.data,
            top_k=top_k.ctypes.data,
            top_p=settings["top_p"].ctypes.data,
            min_p=settings["min_p"].ctypes.data,
            ids=tokens,
        )
        if not penalised:
            self._decoder.handle.sample(args)
            return
        counts, in_prompt = self._sampler.seen()
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            setattr(args, name, settings[name].ctypes.data)
        args.counts, args.in_prompt, args.table_rows = counts.ctypes.data, in_prompt.ctypes.data, rows.ctypes.data
        self._decoder.handle.sample(args)
        counts[rows, self._tokens[:count]] += 1
