"""Processor: samples and chat messages to packed batches. Glue between tokenizer, conversation and images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isqrt
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from llava_fast.batch import PackedBatch
from llava_fast.config import IGNORE, IMAGE_SENTINEL, ModelConfig
from llava_fast.errors import ConfigError, ImageError, LlavaError, PromptTooLongError, SampleError, TokenizerError
from llava_fast.processor.conversation import (
    IMAGE_MARK,
    EncodedText,
    count_characters,
    encode_conversation,
    encode_prompt,
    find_template,
)
from llava_fast.processor.image import ImageProcessor
from llava_fast.processor.tokenizer import Tokenizer


@dataclass
class Encoded:
    """One sequence, images expanded to their rows but not yet decoded.

    Attributes:
        input_ids: (n,) int64. Token ids; the image token id ``tokens_per_image`` times for each image.
        labels: (n,) int64. ``labels[i]`` is the token that position i must predict; ``IGNORE`` (-100) where nothing is
            learned, where the next position is an image row, and at the last position.
        images: the image sources in order (paths, bytes, PIL images, ...).
        sample_id: the sample's id as text.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[Any]
    sample_id: str


class Processor:
    """Turns LLaVA samples and chat messages into what the model takes.

    Args:
        tokenizer: the language model's tokenizer.
        image: prepares pixels.
        template: conversation template of the checkpoint.
        image_token_id: id that stands at image rows.
        tokens_per_image: rows of one image.
        image_start_token_id: marker before every image (the v0 checkpoints), or None.
        image_end_token_id: marker after every image, or None.
        max_length: longest sequence in tokens, image rows included.

    Raises:
        ConfigError: an unknown template, or a length that cannot be.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageProcessor,
        *,
        template: str,
        image_token_id: int,
        tokens_per_image: int,
        image_start_token_id: int | None = None,
        image_end_token_id: int | None = None,
        max_length: int = 2048,
    ):
        find_template(template)
        if tokens_per_image < 1 or max_length < 1:
            raise ConfigError(f"{tokens_per_image=} and {max_length=} must be 1 or more")
        self.tokenizer = tokenizer
        self.image = image
        self.template = template
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.image_start_token_id = image_start_token_id
        self.image_end_token_id = image_end_token_id
        self.max_length = max_length

    @staticmethod
    def from_config(config: ModelConfig, tokenizer: Tokenizer) -> Processor:
        """The processor that fits a model.

        Raises:
            TokenizerError: the tokenizer has ids that the model's embedding has no row for.
        """
        largest = max(tokenizer.vocab_size - 1, config.image_token_id)
        if largest >= config.text.vocab_size:
            raise TokenizerError(
                f"the tokenizer's ids (with image_token_id={config.image_token_id}) reach {largest}, but the model "
                f"embeds {config.text.vocab_size} tokens; use the tokenizer that belongs to the checkpoint"
            )
        return Processor(
            tokenizer,
            ImageProcessor(config.vision.image_size, config.image_aspect),
            template=config.template,
            image_token_id=config.image_token_id,
            tokens_per_image=config.tokens_per_image,
            image_start_token_id=config.image_start_token_id,
            image_end_token_id=config.image_end_token_id,
            max_length=config.text.max_position_embeddings,
        )

    def encode(
        self,
        sample: Mapping[str, Any],
        *,
        mask: str = "answers",
        image_position: str = "as_written",
        seed: int = 0,
        epoch: int = 0,
    ) -> Encoded:
        """Tokenize a training sample.

        Args:
            sample: ``{"id", "image": a source or a list of them or absent, "conversations": [...]}``.
            mask: see :func:`~llava_fast.processor.conversation.encode_conversation`.
            image_position: see there; a random place depends on ``seed``, ``epoch`` and the sample's id alone.
            seed: of the run.
            epoch: number of the pass over the data.

        Raises:
            SampleError: the sample is malformed, or cutting it to ``max_length`` would split an image or leave nothing
                to learn.
        """
        sample_id = str(sample.get("id", ""))
        images = _as_list(sample.get("image"))
        turns = sample.get("conversations")
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise SampleError(sample_id, f"'conversations' is {turns!r:.80}; it must be a list of turns")
        try:
            encoded = encode_conversation(
                turns,
                self.tokenizer,
                self.template,
                mask=mask,
                image_position=image_position,
                rng=_sample_rng(seed, epoch, sample_id) if image_position == "random" else None,
                num_images=len(images),
                sample_id=sample_id,
            )
        except TokenizerError as error:
            raise SampleError(sample_id, str(error)) from error
        input_ids, labels, blocks = self._expand(encoded, sample_id)
        if len(input_ids) > self.max_length:
            input_ids, labels, images = self._truncate(input_ids, labels, blocks, images, sample_id)
        return Encoded(input_ids, labels, images, sample_id)

    def prompt(self, messages: Sequence[dict[str, Any]]) -> Encoded:
        """Tokenize chat messages up to where the assistant speaks; nothing is learned.

        Args:
            messages: see :func:`~llava_fast.processor.conversation.encode_prompt`.

        Raises:
            LlavaError: malformed messages; PromptTooLongError: more than ``max_length`` tokens.
        """
        characters, most = count_characters(messages), self.max_length * self.tokenizer.longest_token
        if characters > most:  # megabytes of text take seconds and hundreds of megabytes of memory to tokenize
            raise PromptTooLongError(
                f"the messages have {characters} characters, and {self.max_length} tokens hold {most} at most; "
                "shorten the text or leave out early turns"
            )
        encoded, images = encode_prompt(messages, self.tokenizer, self.template)
        input_ids, labels, _ = self._expand(encoded, "")
        if len(input_ids) > self.max_length:
            raise PromptTooLongError(
                f"the prompt has {len(input_ids)} tokens, {len(images) * self.tokens_per_image} of them image rows, "
                f"where {self.max_length} fit; shorten the text, leave out early turns or send fewer images"
            )
        return Encoded(input_ids, labels, images, "")

    def prompt_of_ids(self, token_ids: Sequence[int], images: list[Any]) -> Encoded:
        """A prompt that is tokenized already, with ``image_token_id`` once for each image.

        Raises:
            LlavaError: the image token does not occur as often as there are images, or an id is no whole number.
        """
        ids = np.array(token_ids)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise LlavaError(f"token_ids={token_ids!r:.80} must be a list of whole numbers")
        ids = ids.astype(np.int64)
        places = ids == self.image_token_id
        if int(places.sum()) != len(images):
            raise LlavaError(
                f"token_ids holds image_token_id={self.image_token_id} {int(places.sum())} times for {len(images)} "
                f"images; put it once where each image belongs"
            )
        ids = np.where(places, IMAGE_SENTINEL, ids)
        input_ids, labels, _ = self._expand(EncodedText(ids.tolist(), [IGNORE] * len(ids)), "")
        return Encoded(input_ids, labels, images, "")

    def collate(self, encoded: Sequence[Encoded]) -> PackedBatch:
        """Lay sequences end to end and decode their images.

        Raises:
            ImageError: an image cannot be used; names the sample.
            ConfigError: no sequences.
        """
        if not encoded:
            raise ConfigError("a batch needs at least one sequence")
        lengths = [len(e.input_ids) for e in encoded]
        sources = [(source, e.sample_id) for e in encoded for source in e.images]
        pixels = torch.empty(len(sources), *self.image.shape)
        for (source, sample_id), out in zip(sources, pixels, strict=True):
            self._decode_image(source, sample_id, out)
        return PackedBatch(
            input_ids=torch.from_numpy(np.concatenate([e.input_ids for e in encoded])),
            labels=torch.from_numpy(np.concatenate([e.labels for e in encoded])),
            position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])),
            cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
            pixel_values=pixels,
            image_token_id=self.image_token_id,
            seqlens=tuple(lengths),
            sample_ids=tuple(e.sample_id for e in encoded),
        )

    def pack(
        self,
        samples: Sequence[Mapping[str, Any]],
        *,
        mask: str = "answers",
        image_position: str = "as_written",
        seed: int = 0,
        epoch: int = 0,
    ) -> PackedBatch:
        """:meth:`encode` each sample and :meth:`collate` them."""
        options: dict[str, Any] = {"mask": mask, "image_position": image_position, "seed": seed, "epoch": epoch}
        return self.collate([self.encode(sample, **options) for sample in samples])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens and image rows."""
        return self.tokenizer.decode([int(i) for i in ids if i != self.image_token_id])

    def save(self, directory: str | Path) -> None:
        """Write tokenizer, image and processor files that :func:`llava_fast.load` and transformers read.

        Where the image token lies beyond the tokenizer's vocabulary it is written as the added token ``<image>``.
        """
        directory = Path(directory)
        tokenizer = self.tokenizer
        if self.image_token_id >= tokenizer.vocab_size:
            tokenizer = tokenizer.with_token(IMAGE_MARK, self.image_token_id)
        tokenizer.save(directory)
        self.image.save(directory)
        side = isqrt(self.tokens_per_image)
        class_token = int(side * side != self.tokens_per_image)  # patches alone are a square number
        config = {
            "processor_class": "LlavaProcessor",
            "patch_size": self.image.size // side,
            "vision_feature_select_strategy": "full" if class_token else "default",
            "num_additional_image_tokens": 1,
            "image_token": IMAGE_MARK,
        }
        (directory / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _expand(self, encoded: EncodedText, sample_id: str) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Images to their rows, labels to next-token targets.

        Returns:
            input_ids (n,), labels (n,), and for each image the range of positions it takes, markers included.
        """
        ids = np.array(encoded.input_ids, dtype=np.int64)
        labels = np.array(encoded.labels, dtype=np.int64)
        if self.image_token_id != IMAGE_SENTINEL and (ids == self.image_token_id).any():
            raise SampleError(
                sample_id, f"its text contains image_token_id={self.image_token_id}; use an id that text cannot give"
            )
        places = np.flatnonzero(ids == IMAGE_SENTINEL)
        blocks: list[tuple[int, int]] = []
        if len(places):
            markers = [[] if i is None else [i] for i in (self.image_start_token_id, self.image_end_token_id)]
            block = [*markers[0], *[self.image_token_id] * self.tokens_per_image, *markers[1]]
            counts = np.ones(len(ids), dtype=np.int64)
            counts[places] = len(block)
            firsts = places + np.arange(len(places)) * (len(block) - 1)  # where each block begins after expansion
            labels[places] = IGNORE
            ids, labels = np.repeat(ids, counts), np.repeat(labels, counts)
            ids[firsts[:, None] + np.arange(len(block))] = block
            blocks = [(first, first + len(block)) for first in firsts.tolist()]
        targets = np.full_like(labels, IGNORE)
        targets[:-1] = labels[1:]
        return ids, targets, blocks

    def _truncate(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        blocks: list[tuple[int, int]],
        images: list[Any],
        sample_id: str,
    ) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        """Cut the tail off at ``max_length``; images that lie wholly in it go with it."""
        limit, length = self.max_length, len(input_ids)
        cut = f"it has {length} tokens, {limit} are kept (max_length), and the cut"
        if any(first < limit < last for first, last in blocks):
            raise SampleError(sample_id, f"{cut} falls inside an image; raise max_length or drop the sample")
        kept = labels[:limit].copy()
        kept[-1] = IGNORE  # its target was cut away
        if (kept == IGNORE).all() and (labels != IGNORE).any():
            raise SampleError(sample_id, f"{cut} leaves nothing to learn; raise max_length or drop the sample")
        return input_ids[:limit].copy(), kept, images[: sum(first < limit for first, _ in blocks)]

    def _decode_image(self, source: Any, sample_id: str, out: torch.Tensor) -> None:
        try:
            self.image(source, out=out)
        except ImageError as error:
            raise (ImageError(f"sample {sample_id!r}: {error}") if sample_id else error) from error


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _sample_rng(seed: int, epoch: int, sample_id: str) -> Random:
    """The same draws for the same seed, epoch and sample in every process."""
    digest = blake2b(f"{seed}/{epoch}/{sample_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return Random(int.from_bytes(digest, "big"))
