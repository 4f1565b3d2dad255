"""Setup: all that a process needs to answer lines. It crosses process borders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from llava_fast.engine import Engine, EngineConfig, Request
from llava_fast.generate.requests import request_of
from llava_fast.pretrained import load

_ENDS = 1 << 20  # bytes at both ends of a file of weights by which it is told from others


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Attributes:
    model: checkpoint directory or hub id; ``vision_tower`` and ``base`` as for :func:`llava_fast.load`.
    dtype: name of a torch dtype, or None for :func:`default_dtype`.
    quantization: None, "int8", "int4" or "fp8".
    engine: budgets.
    sampling: fields of SamplingParams for lines that do not say otherwise.
    seed: from which, with a line's number, its draws follow; None for other draws in every run.
    image_dir: what paths of images are relative to.
    """

    model: str
    vision_tower: str | None = None
    base: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = 0
    image_dir: Path | None = None

    @property
    def in_flight(self) -> int:
        """Lines that an engine holds at a time: those it works on, and as many again, so that it never waits."""
        return 2 * self.engine.max_sequences

    def open(self, device: str) -> Engine:
        """Load the model onto ``device`` and start an engine."""
        where = torch.device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        model, processor = load(
            self.model,
            device=where,
            dtype=getattr(torch, self.dtype or default_dtype(device)),
            quantization=self.quantization,
            vision_tower=self.vision_tower,
            base=self.base,
        )
        return Engine(model, processor, self.engine)

    def request(self, row: Mapping[str, Any], number: int) -> Request:
        """What a row asks for. Raises InvalidRequestError."""
        return request_of(row, number, defaults=self.sampling, seed=self.seed, image_dir=self.image_dir)


def default_dtype(device: str) -> str:
    """What is computed in where nothing else was asked for."""
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"


def checkpoint_digest(directory: Path) -> str:
    """Tells checkpoints apart: names, sizes, and the beginnings and ends of their files."""
    digest = blake2b(digest_size=16)
    for path in sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(_ENDS, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()
