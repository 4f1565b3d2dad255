"""A small run: the built-in pictures, the tiny tokenizer, a smaller model."""

from __future__ import annotations

import dataclasses
import json

import pytest

import llava_fast as lf
from llava_fast.data.scenes import Scenes, write
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import PARTS
from llava_fast.train.recipe import recipe
from llava_fast.train.trainer import Trainer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(PARTS / "decoder")


@pytest.fixture
def small(tokenizer):
    """A fresh model of the tiny preset's shape with fewer layers, and its processor."""
    tiny = lf.ModelConfig.preset("tiny")
    config = tiny.replace(
        text=dataclasses.replace(tiny.text, num_hidden_layers=2, max_position_embeddings=512),
        vision=dataclasses.replace(tiny.vision, num_hidden_layers=2),
    )
    return lf.Llava(config, seed=1), Processor.from_config(config, tokenizer)


@pytest.fixture
def trainer(small, tmp_path):
    """Makes a Trainer of the small model; keyword arguments change the recipe."""

    def make(samples=None, out="run", eval_samples=None, **changes):
        model, processor = small
        changes = {"batch_size": 8, "log_every": 1, "save_every": 2, "workers": 0, "template": "v1", **changes}
        chosen = recipe("paper-stage2" if changes.get("stage") == 2 else "paper-stage1", **{"epochs": 1, **changes})
        return Trainer(
            model,
            processor,
            chosen,
            Scenes(32, 5) if samples is None else samples,
            tmp_path / out,
            eval_samples=eval_samples,
        )

    return make


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """The built-in pictures as files, as a user's data would be: scenes.json and images."""
    folder = tmp_path_factory.mktemp("scenes")
    write(folder, 64, 3)
    return folder


def losses(folder, name="loss"):
    """What the log has of every step; ``name``: another of its numbers."""
    return [r[name] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if name in r]
