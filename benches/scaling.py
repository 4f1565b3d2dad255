"""The arithmetic of docs/scaling.md: python -m benches.scaling prints its tables. On paper: no card is asked.

What is assumed stands in ASSUMED, by name; what follows is computed with the code that counts a run's operations
(train/flops.py) and its memory (train/memory.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from llava_fast.config import ModelConfig
from llava_fast.model import Llava
from llava_fast.train.flops import PEAK, sample_flops
from llava_fast.train.memory import Estimate, build_parser, of_preset
from llava_fast.train.stages import freeze

ASSUMED = {
    "bf16 peak of an H100, TFLOP/s": PEAK["H100"] / 1e12,
    "share of it that a large matrix product reaches": 0.80,
    "share of that which a training step reaches (the goal)": 0.70,
    "inside a node, GB/s into each GPU (NVLink: 450, at 80%)": 360.0,
    "between nodes, GB/s into each GPU (400 Gbit/s a GPU: 50, at 80%)": 40.0,
    "memory, GB/s (3350, at 80%)": 2680.0,
    "GPUs of a node, which share one copy of the weights": 8,
    "dearest over average rank's work": 1.03,
}
RATE = 1e12 * math.prod(list(ASSUMED.values())[:3])  # FLOP/s of a GPU
INSIDE, BETWEEN, MEMORY, NODE, SPREAD = list(ASSUMED.values())[3:]


@dataclass(frozen=True)
class Data:
    """Means of a sample (the mixtures of LLaVA-1.5) and their number."""

    tokens: int
    supervised: int
    images: float
    samples: int


DATA = {1: Data(600, 24, 1.0, 558_000), 2: Data(800, 150, 0.94, 665_000)}
A_GPU = {1: 32, 2: 16}  # samples of a step: 256 and 128 on one node, the recipes' batches
MODELS = ("llava-1.5-7b", "llava-1.5-13b")


@dataclass(frozen=True)
class Step:
    """Milliseconds of a step on every GPU, and what follows."""

    gpus: int
    batch: int
    flops: float
    compute: float
    inside: float
    between: float
    optimizer: float

    @property
    def total(self) -> float:
        """Layers are gathered and gradients summed while others compute; the optimizer waits for all."""
        return max(self.compute * SPREAD, self.inside, self.between) + self.optimizer


@cache
def parameters(name: str, stage: int) -> tuple[int, int]:
    """Of what is trained, and of what is gathered layer by layer: in stage 1 nothing is."""
    model = Llava(ModelConfig.preset(name), device="meta", dtype=torch.bfloat16, seed=None)
    freeze(model, stage)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, trained if stage == 2 else 0


def step(name: str, stage: int, gpus: int, a_gpu: int) -> Step:
    data = DATA[stage]
    sizes = np.array([[data.tokens, data.supervised, data.images]])
    flops = float(sample_flops(ModelConfig.preset(name), sizes, stage == 2)[0]) * a_gpu
    trained, gathered = parameters(name, stage)
    passes = math.ceil(a_gpu * data.tokens / 8192)
    nodes = gpus // NODE
    # bf16 weights gathered in the forward pass and again in the backward pass, float32 gradients summed: of each 7/8
    # comes from the others of the node. Between nodes the shards' sums: a ring takes and passes on (n-1)/n twice.
    inside = passes * (NODE - 1) / NODE * (2 * 2 * gathered + 4 * trained) / INSIDE / 1e9
    between = passes * 2 * (nodes - 1) / nodes * 4 * trained / NODE / BETWEEN / 1e9
    moved = 28 * trained / NODE  # read weight, gradient and two moments; write three of them
    return Step(gpus, gpus * a_gpu, flops, flops / RATE * 1e3, inside * 1e3, between * 1e3, moved / MEMORY / 1e6)


@cache
def memory(name: str, stage: int, checkpointing: str) -> Estimate:
    options = f"--preset {name} --stage {stage} --devices {NODE} --activation-checkpointing {checkpointing}"
    return of_preset(build_parser().parse_args(options.split()))


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---:" for _ in head], *rows])


def times(stage: int, counts: list[tuple[int, int]]) -> str:
    """counts: (GPUs, samples a GPU)."""
    head = ["model", "GPUs", "batch", "TFLOP a GPU", "compute ms", "in node ms", "between ms", "AdamW ms", "step ms"]
    rows = []
    for name in MODELS:
        for gpus, a_gpu in counts:
            s = step(name, stage, gpus, a_gpu)
            per_second = s.batch / s.total * 1e3
            numbers = (s.compute, s.inside, s.between, s.optimizer, s.total)
            rows.append(
                [name.split("-")[-1], f"{gpus}", f"{s.batch:,}", f"{s.flops / 1e12:.0f}"]
                + [f"{n:,.0f}" for n in numbers]
                + [f"{s.flops / s.total / 1e9 / (PEAK['H100'] / 1e12):.0%}", f"{per_second:,.0f}"]
                + [f"{DATA[stage].samples / per_second / 60:,.0f}"]
            )
    return table([*head, "MFU", "samples/s", "epoch, min"], rows)


def memories() -> str:
    head = ["model", "stage", "checkpointing", "weights", "masters", "moments", "gradients", "gathered", "step", "GB"]
    rows = []
    for name in MODELS:
        for stage, checkpointing in ((1, "none"), (1, "full"), (2, "none"), (2, "selective"), (2, "full")):
            e = memory(name, stage, checkpointing)
            parts = (e.weights, e.masters, e.moments, e.gradients, e.gathered, e.step, e.total)
            rows.append([name.split("-")[-1], f"{stage}", checkpointing, *(f"{p / 1e9:.1f}" for p in parts)])
    return table(head, rows)


def report() -> str:
    """The tables of docs/scaling.md."""
    rows = [[name, f"{value:g}"] for name, value in ASSUMED.items()]
    rows += [
        [f"stage {stage}: tokens, supervised, images of a mean sample; samples", " / ".join(map(str, vars(d).values()))]
        for stage, d in DATA.items()
    ]
    parts = {
        "Assumed": table(["what", "value"], rows),
        "Stage 2, 16 samples a GPU": times(2, [(8, 16), (64, 16), (512, 16)]),
        "Stage 2, the batch of 128 on more GPUs": times(2, [(8, 16), (16, 8), (32, 4), (64, 2)]),
        "Stage 1, 32 samples a GPU": times(1, [(8, 32), (64, 32), (512, 32)]),
        "Memory of a GPU, bins of 8192 tokens, 8 GPUs to a copy of the weights": memories(),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items()) + "\n"


if __name__ == "__main__":
    print(report(), end="")
