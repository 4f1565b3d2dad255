"""Runner: one step of the model on a device, from the scheduler's chunks to tokens on their way to the host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_fast.engine import attention
from llava_fast.engine.config import EngineConfig
from llava_fast.engine.graphs import DecodeGraphs, TowerGraphs
from llava_fast.engine.host_decoder import HostDecoder
from llava_fast.engine.images import FeatureCache, PreparedImage
from llava_fast.engine.inputs import BlockTables, StepInputs, build, image_rows
from llava_fast.engine.kv_cache import FP8, KVCache
from llava_fast.engine.native_decoder import NativeDecoder
from llava_fast.engine.native_tower import NativeTower
from llava_fast.engine.plain_steps import PlainSteps
from llava_fast.engine.prompt import Prompt
from llava_fast.engine.request import SamplingParams
from llava_fast.engine.sampler import Logprobs, Sampler
from llava_fast.engine.scheduler import Chunk
from llava_fast.engine.sequence import Sequence
from llava_fast.engine.transfer import download, gather, upload
from llava_fast.model import Llava
from llava_kernels.dispatch import use_triton
from llava_kernels.linear import multiplies_in_software

log = logging.getLogger(__name__)

PromptScores = tuple[Sequence, list[int], Logprobs]  # a sequence, places in its prompt, and the values there


@dataclass
class Launched:
    """A step under way.

    Attributes:
        chunks: what it computes.
        sequences: those that draw a token, in the order of ``tokens``.
        tokens: theirs; a tensor is (n,) int64 on the host, and there once :meth:`wait` returns.
        logprobs: of the drawn tokens, if any sequence wants them.
        prompts: log-probabilities of prompt tokens.
    """

    chunks: list[Chunk]
    sequences: list[Sequence]
    tokens: Tensor | list[int]
    logprobs: Logprobs | None
    prompts: list[PromptScores]
    copied: torch.cuda.Event | None = None

    def wait(self) -> list[int]:
        """The tokens, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tokens if isinstance(self.tokens, list) else self.tokens.tolist()


class Runner:
    """Holds the cache, the tables and what steps need besides; the model is the caller's.

    Args:
        model: stays as it is; several runners may share one.
        config: budgets.
        features: cache that the vision tower's results are put into.
    """

    def __init__(self, model: Llava, config: EngineConfig, features: FeatureCache):
        self.model, self.config, self.features = model, config, features
        self.device = model.device
        self.cache = KVCache(model.config.text, config, model.device, _cache_dtype(model, config))
        self.sampler = Sampler(config.max_sequences, model.config.text.vocab_size, model.device)
        context = model.config.text.max_position_embeddings
        self.max_length = min(config.max_length or context, context)
        self.tables = BlockTables(config.max_sequences, -(-self.max_length // config.block_size))
        self.host_decoder = _host_decoder(model, config, self.cache, self.max_length)
        self.plain_steps = self._plain_steps()
        self.tower = _tower(model, self.host_decoder)
        self.stream: torch.cuda.Stream | None = None
        self.decode_graphs: DecodeGraphs | None = None
        self.tower_graphs: TowerGraphs | None = None
        if model.device.type == "cuda":
            self._use_cuda()
        self.images_seen = 0

    def _plain_steps(self) -> PlainSteps | None:
        if not isinstance(self.host_decoder, NativeDecoder):
            return None
        return PlainSteps(self.host_decoder, self.model.decoder.embed_tokens, self.sampler, self.tables)

    def _use_cuda(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the weights may still be on their way
        if self.config.cuda_graphs:
            self.decode_graphs = DecodeGraphs(
                self.model,
                self.cache,
                self.sampler,
                self.stream,
                max_length=self.max_length,
                max_sequences=self.config.max_sequences,
            )
            self.tower_graphs = TowerGraphs(self.model, self.config.image_batch, self.stream)

    def launch(self, chunks: list[Chunk]) -> Launched:
        """Start one step. On CUDA it returns before the step is done."""
        if self.plain_steps is not None and self.plain_steps.fit(chunks):
            return Launched(chunks, [c.sequence for c in chunks], self.plain_steps(chunks), None, [])
        return self._launch(chunks)

    @torch.inference_mode()
    def _launch(self, chunks: list[Chunk]) -> Launched:
        with self.on_stream():
            reading = [c for c in chunks if not c.sequence.on_device]
            self.sampler.admit([c.sequence for c in reading if c.sequence.written == 0])
            self._see([image for c in reading for image in self._needed(c)])
            inputs = build(chunks, self.tables, self.config.block_size)
            recorded = self.decode_graphs is not None and inputs.only_decodes
            sent = upload(inputs.draws if recorded else inputs.arrays, self.device)
            logits, prompts = self._logits(inputs, sent)
            drawing = [c.sequence for c in inputs.chunks if c.draws]
            tokens, logprobs = sent["draw_rows"], None
            if logits is not None:
                tokens, logprobs = self.sampler.draw(logits, drawing, sent["draw_rows"], sent["draw_positions"])
            launched = Launched(chunks, drawing, download(tokens), logprobs, prompts)
            if self.stream is not None:
                launched.copied = torch.cuda.Event()
                launched.copied.record(self.stream)
            return launched

    def on_stream(self) -> AbstractContextManager:
        """The engine's own stream: its steps neither wait for the host program's work nor hold it up."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _logits(self, inputs: StepInputs, sent: dict[str, Tensor]) -> tuple[Tensor | None, list[PromptScores]]:
        """(n, V) logits of the sequences that draw a token, None where none does, and what prompts are scored with."""
        if self.decode_graphs is not None and inputs.only_decodes:
            return self.decode_graphs.logits(inputs), []
        if inputs.only_decodes:
            return self._head(self._hidden(inputs, sent)), []
        rows = sent["logit_rows"]
        if not any(c.sequence.scored < c.sequence.asked for c in inputs.chunks):
            hidden = self._hidden(inputs, sent, rows)
            return self._head(hidden) if len(rows) else None, []
        hidden = self._hidden(inputs, sent)
        return self._head(hidden[rows]) if len(rows) else None, self._score_prompts(inputs, hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden) if self.host_decoder is None else self.host_decoder.head(hidden)

    def _hidden(self, inputs: StepInputs, sent: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """(T, D) before the final norm, or (n, D) of ``rows`` (n,) alone."""
        decoder, decodes = self.model.decoder, inputs.decodes
        ids = sent["input_ids"]
        if inputs.only_decodes:
            ids = self.sampler.last[sent["rows"]]
        elif decodes:
            ids[:decodes] = self.sampler.last[sent["rows"][:decodes]]
        embedded = self._splice(inputs, sent) if inputs.images else gather(decoder.embed_tokens, ids)
        if self.host_decoder is not None and not use_triton(embedded):
            return self.host_decoder(embedded, inputs, rows)
        if inputs.only_decodes:
            attend = attention.decoding(self.cache, sent, inputs.max_context)
        else:
            attend = attention.mixed(self.cache, inputs, sent, self.model.attention)
        return decoder(embedded, sent["position_ids"], attend, rows)

    def _splice(self, inputs: StepInputs, sent: dict[str, Tensor]) -> Tensor:
        parts = []
        for image, first, last, _ in inputs.images:
            assert image.features is not None
            parts.append(image.features[first:last])
        rows, text = image_rows(inputs)
        places = upload({"image": rows, "text": text}, self.device)
        features = parts[0] if len(parts) == 1 else torch.cat(parts)  # (P, C)
        return self.model.projector(
            features.unsqueeze(0), self.model.decoder.embed_tokens, sent["input_ids"], places["image"], places["text"]
        )

    def _needed(self, chunk: Chunk) -> list[PreparedImage]:
        images = chunk.sequence.prompt.images_within(chunk.start, chunk.start + chunk.count)
        return [image for image, _ in images if image.features is None]

    def _see(self, images: list[PreparedImage]) -> None:
        """Features of images that have none yet: from the cache, or through the vision tower in batches."""
        new: dict[bytes, list[PreparedImage]] = {}
        for image in images:
            image.features = self.features.get(image.digest, count=False) if image.digest not in new else None
            if image.features is None:
                new.setdefault(image.digest, []).append(image)
            else:
                image.pixels = None
        waiting = list(new.values())
        for start in range(0, len(waiting), self.config.image_batch):
            batch = waiting[start : start + self.config.image_batch]
            for same, features in zip(batch, self._features([same[0] for same in batch]), strict=True):
                self.features.put(same[0].digest, features)
                for image in same:
                    image.features, image.pixels = features, None

    def _features(self, images: list[PreparedImage]) -> list[Tensor]:
        # By numpy: torch would wake threads for it, which then wait for more on a core that the C library's want.
        pixels = torch.from_numpy(np.stack([image.pixels.numpy() for image in images if image.pixels is not None]))
        self.images_seen += len(images)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        if self.tower_graphs is not None:
            found = self.tower_graphs.features(pixels)
        else:
            found = self.tower(pixels.to(self.device, non_blocking=True))
        return [features.clone() for features in found]  # one tensor an image: none holds the memory of its whole batch

    def _score_prompts(self, inputs: StepInputs, hidden: Tensor) -> list[PromptScores]:
        scored = []
        starts = inputs.arrays["query_start"].tolist()
        for row, chunk in zip(starts, inputs.chunks, strict=False):
            sequence, prompt = chunk.sequence, chunk.sequence.prompt
            first, last = max(chunk.start + 1, sequence.scored), min(chunk.start + chunk.count + 1, len(prompt.ids))
            if first >= last:
                continue
            places = [p for p in range(first, last) if not prompt.images_within(p, p + 1)]
            if not places:
                continue
            sent = upload({"rows": np.array(places) - 1 - chunk.start + row, "ids": sequence.ids[places]}, self.device)
            logits = self._head(hidden[sent["rows"]])
            scored.append((sequence, places, Logprobs.of(logits, sent["ids"], sequence.sampling.prompt_logprobs or 0)))
        return scored

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run the tower, prompts and answers of no meaning, so that no request waits for a compilation or a recording.

        The cache's first blocks are written; nobody has been told of them.
        """
        side = self.model.config.vision.image_size
        with self.on_stream():
            pixels = torch.zeros(1, 3, side, side, device=self.device)
            self.tower(pixels)
            for sampling in (SamplingParams(), SamplingParams(temperature=1.0, top_k=5, top_p=0.9)):
                self._answer_nothing(sampling)
            for graphs in (self.decode_graphs, self.tower_graphs):
                if graphs is not None:
                    for size in reversed(graphs.sizes):  # the largest first: the others fit into its memory
                        graphs.record(size)
            if self.stream is not None:
                self.stream.synchronize()

    def _answer_nothing(self, sampling: SamplingParams) -> None:
        """A prompt and three tokens after it, past the scheduler."""
        length = max(1, min(32, self.max_length - 3, self.cache.num_blocks * self.cache.block_size - 3))
        prompt = Prompt(np.zeros(length, dtype=np.int64))
        nobody: Any = None
        sequence = Sequence(
            nobody, prompt, sampling, index=0, limit=3, order=(0, 0, 0), root="", seed=0, stop_ids=(), text=nobody
        )
        blocks = -(-(length + 3) // self.cache.block_size)
        sequence.slot, sequence.blocks = 0, list(range(min(self.cache.num_blocks, blocks)))
        for start, count in ((0, length), (length, 1), (length + 1, 1)):
            if start + count <= len(sequence.blocks) * self.cache.block_size:
                self.launch([Chunk(sequence, start, count, draws=True)]).wait()
                sequence.on_device = True

    def close(self) -> None:
        """Let go of everything on the device."""
        if self.stream is not None:
            self.stream.synchronize()
        del self.cache, self.sampler, self.model, self.host_decoder, self.plain_steps, self.tower
        del self.decode_graphs, self.tower_graphs
        self.features.clear()
        if self.stream is not None:
            torch.cuda.empty_cache()  # back to the device, for whoever else is on it


def _misfit(model: Llava, config: EngineConfig) -> str | None:
    """Why this model on a CPU is not decoded by the C library, None where it is."""
    return "the C library has no fp8 cache" if config.kv_cache_dtype == "fp8" else NativeDecoder.misfit(model)


def _tower(model: Llava, decoder: NativeDecoder | HostDecoder | None) -> Callable[[Tensor], Tensor]:
    """(N, 3, H, W) -> features: the tower through the C library beside its decoder, or the model's own modules."""
    if isinstance(decoder, NativeDecoder) and NativeTower.misfit(model, decoder.handle) is None:
        return NativeTower(model, decoder.handle)
    return model.image_features


def _cache_dtype(model: Llava, config: EngineConfig) -> torch.dtype:
    """The model's own; float32 where torch multiplies 16-bit floats in software: twice the bytes, several times the
    speed."""
    in_torch = model.device.type == "cpu" and _misfit(model, config) is not None and HostDecoder.fits(model)
    return torch.float32 if in_torch and multiplies_in_software(model.decoder.embed_tokens) else model.dtype


def _host_decoder(
    model: Llava, config: EngineConfig, cache: KVCache, max_length: int
) -> NativeDecoder | HostDecoder | None:
    """What runs the decoder on a CPU: the C library, torch in one flat function, or (None) the model's own modules."""
    if model.device.type != "cpu":
        return None
    why_not = _misfit(model, config)
    if why_not is None:
        decoder = NativeDecoder(model, cache, max_length, config)
        log.info("decoding through the C library (%s, %d threads)", decoder.instructions, decoder.threads)
        return decoder
    log.info("decoding with torch: %s", why_not)
    return HostDecoder(model, cache, max_length) if cache.memory.dtype is not FP8 and HostDecoder.fits(model) else None
