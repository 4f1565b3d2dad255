"""A small random LLaVA, transformers' and ours with the same weights, and a processor for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.checkpoint import load_model
from llava_fast.processor import ImageProcessor, Processor, Tokenizer
from tests import transformers_llava as hf
from tests.processor.conftest import tiny_model  # noqa: F401  # a fixture

VOCAB = 420
IMAGE = hf.IMAGE


@dataclass
class Pair:
    theirs: LlavaForConditionalGeneration
    model: lf.Llava
    processor: Processor

    def engine(self, *, background: bool = False, **config) -> lf.Engine:
        config = {"kv_cache_bytes": 1 << 22, "max_sequences": 16, "max_step_tokens": 256, **config}
        return lf.Engine(self.model, self.processor, lf.EngineConfig(**config), background=background)

    @torch.inference_mode()
    def reference(self, request: lf.Request) -> list[int]:
        """transformers' greedy tokens for the request alone."""
        ids = []
        for token in request.token_ids:
            ids += [IMAGE] * 16 if token == IMAGE else [token]
        seen = {"pixel_values": self.processor.image.stack(request.images)} if request.images else {}
        made = self.theirs.generate(
            input_ids=torch.tensor([ids]),
            **seen,
            max_new_tokens=request.sampling.max_tokens,
            do_sample=False,
            eos_token_id=self.processor.tokenizer.eos_id,
            pad_token_id=0,
        )
        return made[0, len(ids) :].tolist()


@pytest.fixture(scope="session")
def pair(tiny_model, tmp_path_factory):  # noqa: F811
    theirs = hf.make(kv_heads=2, vocab=VOCAB, seed=3)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    model = load_model(folder).requires_grad_(False)
    processor = Processor(
        Tokenizer.load(tiny_model),
        ImageProcessor(28),
        template="v1",
        image_token_id=IMAGE,
        tokens_per_image=16,
        max_length=512,
    )
    return Pair(theirs, model, processor)


def picture(rng: np.random.Generator, side: int = 28) -> np.ndarray:
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)


def prompt(rng: np.random.Generator, length: int, images: int = 0) -> list[int]:
    """BOS, ``length`` text tokens, and the image token at ``images`` places among them."""
    ids = [1, *rng.integers(5, VOCAB, length).tolist()]
    for place in sorted(rng.integers(1, len(ids) + 1, images).tolist(), reverse=True):
        ids.insert(place, IMAGE)
    return ids


def question(text: str = "what is in this image", image=None) -> list[dict]:
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
