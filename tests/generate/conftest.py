"""A small random checkpoint on disk, a picture, and the command line on them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import llava_fast as lf
from llava_fast.generate.__main__ import main
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import PARTS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Directory of a model of the tiny preset's widths with random weights; ``a.png`` lies in it."""
    tiny = lf.ModelConfig.preset("tiny")
    config = tiny.replace(
        text=dataclasses.replace(tiny.text, num_hidden_layers=2, max_position_embeddings=512),
        vision=dataclasses.replace(tiny.vision, num_hidden_layers=2),
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    lf.save(lf.Llava(config, seed=1), Processor.from_config(config, Tokenizer.load(PARTS / "decoder")), folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


@pytest.fixture(scope="session")
def loaded(checkpoint):
    return lf.load(checkpoint)


class Batch:
    """An input file, its output, and the command on them."""

    def __init__(self, folder, checkpoint):
        self.checkpoint = checkpoint
        self.input, self.output, self.summary = (folder / n for n in ("in.jsonl", "out.jsonl", "sum.json"))
        (folder / "a.png").write_bytes((checkpoint / "a.png").read_bytes())

    def write(self, *rows) -> None:
        """Rows as JSON; text stands as it is."""
        self.input.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def options(self, *options) -> list[str]:
        files = ["--input", self.input, "--output", self.output, "--json", self.summary]
        budgets = ["--devices", "cpu", "--max-tokens", 4, "--kv-cache-bytes", 1 << 21, "--max-sequences", 4]
        return [str(one) for one in (self.checkpoint, *files, *budgets, *options)]

    def run(self, *options) -> int:
        return main(self.options(*options))

    @property
    def answers(self) -> list[dict]:
        """By line, whatever the order in which they were written."""
        return sorted(map(json.loads, self.output.read_text().splitlines()), key=lambda answer: answer["line"])


@pytest.fixture
def batch(tmp_path, checkpoint):
    return Batch(tmp_path, checkpoint)
