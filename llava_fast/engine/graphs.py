"""CUDA graphs: decode steps and the vision tower recorded once a batch size and replayed, with no launches in between.

Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.engine.attention import decoding
from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.kv_cache import KVCache
from llava_fast.engine.sampler import Sampler
from llava_fast.engine.transfer import layout, upload
from llava_fast.model import Llava


def buckets(most: int) -> list[int]:
    """Batch sizes that are recorded: 1, 2, 4, 8, then every eighth; a smaller batch is filled up to the next."""
    return [size for size in (1, 2, 4) if size < most] + [*range(8, most, 8), most]


class Recorded:
    """A function without arguments, over tensors that stay where they are, as a graph."""

    def __init__(self, run: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any):
        run()  # compiles kernels and lets libraries allocate, which a recording must not
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the host program may use CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._out = run()

    def replay(self) -> Tensor:
        """What the function returns; the next replay writes over it."""
        self._graph.replay()
        return self._out


class DecodeGraphs:
    """Steps in which every sequence decodes one token: from the tokens drawn last to logits.

    Args:
        max_length: tokens of the longest sequence; attention splits its keys for that length.
        max_sequences: the largest batch; its row in ``sampler`` is the padding's.
    """

    def __init__(
        self,
        model: Llava,
        cache: KVCache,
        sampler: Sampler,
        stream: torch.cuda.Stream,
        *,
        max_length: int,
        max_sequences: int,
    ):
        self._model, self._cache, self._sampler, self._stream = model, cache, sampler, stream
        self._max_length, self._max_sequences = max_length, max_sequences
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[int, tuple[Recorded, Tensor]] = {}
        self.sizes = buckets(max_sequences)

    def logits(self, inputs: StepInputs) -> Tensor:
        """(S, V) for the S sequences of a step that only decodes."""
        count = len(inputs.chunks)
        size = next(size for size in self.sizes if size >= count)
        recorded, memory = self.record(size)
        upload(self.padded(inputs, size), memory.device, into=memory)
        return recorded.replay()[:count]

    def record(self, size: int) -> tuple[Recorded, Tensor]:
        """The graph for ``size`` sequences and the memory that it reads its inputs from."""
        if size not in self._recorded:
            arrays = self.padded(None, size)
            memory = torch.empty(layout(arrays)[0], dtype=torch.uint8, device=self._model.device)
            sent = upload(arrays, memory.device, into=memory)
            self._recorded[size] = (Recorded(lambda: self._step(sent), self._stream, self._pool), memory)
        return self._recorded[size]

    def padded(self, inputs: StepInputs | None, size: int) -> dict[str, np.ndarray]:
        """The step's arrays filled up to ``size`` sequences: the padding's keys are not stored and it sees none."""
        blocks = -(-self._max_length // self._cache.block_size)
        arrays: dict[str, np.ndarray] = {
            "rows": np.full(size, self._max_sequences, dtype=np.int64),
            "slots": np.full(size, -1, dtype=np.int64),
            "position_ids": np.zeros(size, dtype=np.int32),
            "context_lens": np.zeros(size, dtype=np.int32),
            "query_start": np.arange(size + 1, dtype=np.int32),
            "block_table": np.zeros((size, blocks), dtype=np.int32),
        }
        if inputs is not None:
            count = len(inputs.chunks)
            for name in ("rows", "slots", "position_ids", "context_lens"):
                arrays[name][:count] = inputs.arrays[name]
            table = inputs.arrays["block_table"]
            arrays["block_table"][:count, : table.shape[1]] = table
        return arrays

    def _step(self, sent: dict[str, Tensor]) -> Tensor:
        decoder = self._model.decoder
        embedded = F.embedding(self._sampler.last[sent["rows"]], decoder.embed_tokens)
        attend = decoding(self._cache, sent, self._max_length)
        return self._model.head(decoder(embedded, sent["position_ids"], attend))


class TowerGraphs:
    """The vision tower at bucketed numbers of images."""

    def __init__(self, model: Llava, most: int, stream: torch.cuda.Stream):
        self._model, self._stream = model, stream
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[int, tuple[Recorded, Tensor]] = {}
        self.sizes = buckets(most)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels: (N, 3, S, S) in page-locked host memory -> Z_v (N, tokens_per_image, C)."""
        size = next(size for size in self.sizes if size >= len(pixels))
        recorded, memory = self.record(size)
        memory[: len(pixels)].copy_(pixels.to(memory.device, non_blocking=True))  # rounded on the device
        return recorded.replay()[: len(pixels)]

    def record(self, size: int) -> tuple[Recorded, Tensor]:
        """The graph for ``size`` images and the pixels that it reads."""
        if size not in self._recorded:
            side = self._model.config.vision.image_size
            memory = torch.zeros(size, 3, side, side, device=self._model.device, dtype=self._model.dtype)
            recorded = Recorded(lambda: self._model.image_features(memory), self._stream, self._pool)
            self._recorded[size] = (recorded, memory)
        return self._recorded[size]
