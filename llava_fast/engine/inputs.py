"""StepInputs: the scheduler's chunks as the packed arrays that one step of the model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_fast.engine.images import PreparedImage
from llava_fast.engine.scheduler import Chunk


@dataclass
class StepInputs:
    """T tokens of S sequences on the host, those that decode one token first.

    Attributes:
        chunks: S, in the order in which they are packed.
        decodes: how many of them are one token whose id lies on the device.
        arrays: by name, to be uploaded. input_ids (T,) int64, 0 for a decode; position_ids (T,) int32; slots (T,)
            int64, where in the cache each token's keys go; block_table (S, blocks) int32; context_lens (S,) int32;
            query_start (S+1,) int32; rows (S,) int64, the runner's row of each; logit_rows (n,) int64, where a token is
            drawn, and draw_rows (n,) and draw_positions (n,) int64, its row in the tables and the place it will have.
        images: the image rows in the step: image, first and last of its rows, and where in T they go.
        max_query, max_context: over the chunks that are not decodes, and over all.
        fresh: no chunk beyond the decodes has anything in the cache yet.
    """

    chunks: list[Chunk]
    decodes: int
    arrays: dict[str, np.ndarray]
    images: list[tuple[PreparedImage, int, int, int]]
    max_query: int
    max_context: int
    fresh: bool

    @property
    def only_decodes(self) -> bool:
        return self.decodes == len(self.chunks)

    @property
    def draws(self) -> dict[str, np.ndarray]:
        """The arrays that the sampler needs."""
        return {name: self.arrays[name] for name in ("draw_rows", "draw_positions")}

    @property
    def num_tokens(self) -> int:
        return len(self.arrays["input_ids"])


class BlockTables:
    """Each running sequence's blocks as a row of one array, brought up to date as they grow."""

    def __init__(self, rows: int, blocks: int):
        self.array = np.zeros((rows, blocks), dtype=np.int32)

    def update(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.written != len(sequence.blocks):
                self.array[sequence.slot, : len(sequence.blocks)] = sequence.blocks
                sequence.written = len(sequence.blocks)


def build(chunks: list[Chunk], tables: BlockTables, block_size: int) -> StepInputs:
    """Lay the chunks out."""
    tables.update(chunks)
    decoding = [c for c in chunks if c.sequence.on_device]
    if len(decoding) == len(chunks):
        return _decodes(chunks, tables, block_size)
    reading = [c for c in chunks if not c.sequence.on_device]
    chunks = decoding + reading
    rows = np.array([c.sequence.slot for c in chunks], dtype=np.int64)
    starts = np.array([c.start for c in chunks], dtype=np.int64)
    counts = np.array([c.count for c in chunks], dtype=np.int64)
    query_start = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    positions = np.arange(query_start[-1]) - np.repeat(query_start[:-1] - starts, counts)
    owners = np.repeat(rows, counts)
    known = [c.sequence.ids[c.start : c.start + c.count] for c in reading]
    contexts = starts + counts
    max_context = int(contexts.max())
    drawn = np.array([i for i, c in enumerate(chunks) if c.draws], dtype=np.int64)
    arrays: dict[str, np.ndarray] = {
        "input_ids": np.concatenate([np.zeros(len(decoding), dtype=np.int64), *known]),
        "position_ids": positions.astype(np.int32),
        "slots": tables.array[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size,
        "block_table": np.ascontiguousarray(tables.array[rows, : -(-max_context // block_size)]),
        "context_lens": contexts.astype(np.int32),
        "query_start": query_start,
        "rows": rows,
        "logit_rows": query_start[1:][drawn].astype(np.int64) - 1,
        "draw_rows": rows[drawn],
        "draw_positions": contexts[drawn],
    }
    images = _images(reading, query_start[len(decoding) :])
    max_query = max(c.count for c in reading)
    fresh = not any(c.start for c in reading)
    return StepInputs(chunks, len(decoding), arrays, images, max_query, max_context, fresh)


def _decodes(chunks: list[Chunk], tables: BlockTables, block_size: int) -> StepInputs:
    """The same where every sequence decodes one token, as in most steps."""
    rows = np.array([c.sequence.slot for c in chunks], dtype=np.int64)
    starts = np.array([c.start for c in chunks], dtype=np.int64)
    blocks, offsets = np.divmod(starts, block_size)
    contexts = starts + 1
    max_context = int(contexts.max())
    arrays: dict[str, np.ndarray] = {
        "input_ids": np.zeros(len(chunks), dtype=np.int64),
        "position_ids": starts.astype(np.int32),
        "slots": tables.array[rows, blocks].astype(np.int64) * block_size + offsets,
        "block_table": tables.array[rows, : -(-max_context // block_size)],
        "context_lens": contexts.astype(np.int32),
        "query_start": np.arange(len(chunks) + 1, dtype=np.int32),
        "rows": rows,
        "draw_rows": rows,
        "draw_positions": contexts,
    }
    return StepInputs(chunks, len(chunks), arrays, [], 1, max_context, fresh=True)


def _images(reading: list[Chunk], places: np.ndarray) -> list[tuple[PreparedImage, int, int, int]]:
    found = []
    for chunk, place in zip(reading, places.tolist(), strict=False):
        prompt, last = chunk.sequence.prompt, chunk.start + chunk.count
        if not prompt.images or chunk.start >= len(prompt.ids):
            continue
        for image, start in prompt.images_within(chunk.start, last):
            first, end = max(start, chunk.start), min(start + prompt.rows, last)
            found.append((image, first - start, end - start, place + first - chunk.start))
    return found


def image_rows(inputs: StepInputs) -> tuple[np.ndarray, np.ndarray]:
    """(P,) int32 positions of image rows in T, in the order of ``inputs.images``, and (T-P,) int32 all others."""
    rows = np.concatenate([np.arange(at, at + last - first, dtype=np.int32) for _, first, last, at in inputs.images])
    text = np.ones(inputs.num_tokens, dtype=bool)
    text[rows] = False
    return rows, np.flatnonzero(text).astype(np.int32)
