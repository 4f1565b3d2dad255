"""Runner: one step of the model on a device, from the scheduler's chunks to tokens on their way to the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.engine import attention
from llava_fast.engine.config import EngineConfig
from llava_fast.engine.host_decoder import HostDecoder
from llava_fast.engine.images import FeatureCache, PreparedImage
from llava_fast.engine.inputs import BlockTables, StepInputs, build, image_rows
from llava_fast.engine.kv_cache import FP8, KVCache
from llava_fast.engine.sampler import Logprobs, Sampler
from llava_fast.engine.scheduler import Chunk
from llava_fast.engine.sequence import Sequence
from llava_fast.engine.transfer import download, upload
from llava_fast.model import Llava
from llava_kernels.dispatch import use_triton


@dataclass
class Launched:
    """A step under way.

    Attributes:
        chunks: what it computes.
        sequences: those that draw a token, in the order of ``tokens``.
        tokens: (n,) int64 on the host, once :meth:`wait` returns.
        logprobs: of the drawn tokens, if any sequence wants them.
        prompts: log-probabilities of prompt tokens: the sequence, the places of the tokens, and the values.
    """

    chunks: list[Chunk]
    sequences: list[Sequence]
    tokens: Tensor
    logprobs: Logprobs | None
    prompts: list[tuple[Sequence, list[int], Logprobs]] = field(default_factory=list)
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


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
        self.cache = KVCache(model.config.text, config, model.device, model.dtype)
        self.sampler = Sampler(config.max_sequences, model.config.text.vocab_size, model.device)
        context = model.config.text.max_position_embeddings
        self.max_length = min(config.max_length or context, context)
        self.tables = BlockTables(config.max_sequences, -(-self.max_length // config.block_size))
        self.host_decoder: HostDecoder | None = None
        if model.device.type == "cpu" and self.cache.memory.dtype is not FP8 and HostDecoder.fits(model.decoder):
            self.host_decoder = HostDecoder(model.decoder, self.cache, self.max_length)
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self.images_seen = 0

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Launched:
        """Start one step. On CUDA it returns before the step is done."""
        with self.on_stream():
            for chunk in chunks:
                if not chunk.sequence.on_device and chunk.sequence.written == 0:
                    self.sampler.admit(chunk.sequence)
            self._see([image for c in chunks for image in self._needed(c)])
            inputs = build(chunks, self.tables, self.config.block_size)
            sent = upload(inputs.arrays, self.device)
            hidden = self._hidden(inputs, sent)
            drawing = [c.sequence for c in inputs.chunks if c.draws]
            tokens, logprobs = sent["draw_rows"], None
            if drawing:
                logits = self.model.head(hidden[sent["logit_rows"]])
                tokens, logprobs = self.sampler.draw(logits, drawing, sent["draw_rows"], sent["draw_positions"])
            launched = Launched(chunks, drawing, download(tokens), logprobs, self._score_prompts(inputs, hidden))
            if self.stream is not None:
                launched.copied = torch.cuda.Event()
                launched.copied.record(self.stream)
            return launched

    def on_stream(self) -> AbstractContextManager:
        """The engine's own stream: its steps neither wait for the host program's work nor hold it up."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _hidden(self, inputs: StepInputs, sent: dict[str, Tensor]) -> Tensor:
        """(T, D) before the final norm."""
        decoder = self.model.decoder
        if inputs.decodes:
            sent["input_ids"][: inputs.decodes] = self.sampler.last[sent["rows"][: inputs.decodes]]
        text_alone = not inputs.images
        embedded = F.embedding(sent["input_ids"], decoder.embed_tokens) if text_alone else self._splice(inputs, sent)
        if self.host_decoder is not None and not use_triton(embedded):
            return self.host_decoder(embedded, inputs)
        attend = attention.paged(self.cache, inputs, sent, self.model.attention)
        return decoder(embedded, sent["position_ids"], attend)

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
            for same, features in zip(batch, self._tower([same[0] for same in batch]), strict=True):
                self.features.put(same[0].digest, features)
                for image in same:
                    image.features, image.pixels = features, None

    def _tower(self, images: list[PreparedImage]) -> list[Tensor]:
        pixels = torch.stack([image.pixels for image in images if image.pixels is not None])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        self.images_seen += len(images)
        # One tensor an image: a kept one must not hold the memory of its whole batch.
        return [features.clone() for features in self.model.image_features(pixels)]

    def _score_prompts(self, inputs: StepInputs, hidden: Tensor) -> list[tuple[Sequence, list[int], Logprobs]]:
        scored = []
        starts = inputs.arrays["query_start"].tolist()
        for row, chunk in zip(starts, inputs.chunks, strict=False):
            sequence, prompt = chunk.sequence, chunk.sequence.prompt
            first, last = max(chunk.start + 1, sequence.scored), min(chunk.start + chunk.count + 1, len(prompt.ids))
            if first >= last:
                continue
            places = [p for p in range(first, last) if not prompt.images_within(p, p + 1)]
            sent = upload({"rows": np.array(places) - 1 - chunk.start + row, "ids": sequence.ids[places]}, self.device)
            logits = self.model.head(hidden[sent["rows"]])
            scored.append((sequence, places, Logprobs.of(logits, sent["ids"], sequence.sampling.prompt_logprobs or 0)))
        return scored

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run the tower and a prompt once, so that kernels are compiled and memory is at its largest. The cache's first
        block is written; nobody has been told of it."""

    def close(self) -> None:
        """Let go of everything on the device."""
        if self.stream is not None:
            self.stream.synchronize()
        del self.cache, self.sampler, self.model, self.host_decoder
        self.features.clear()
        if self.stream is not None:
            torch.cuda.empty_cache()  # back to the device, for whoever else is on it
