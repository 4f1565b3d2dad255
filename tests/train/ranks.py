"""What the ranks of tests/train/test_distributed.py run: python -m tests.train.ranks FOLDER RUN...

Each RUN is a JSON object: ``out`` below FOLDER, and changes to the recipe. The first that fails ends it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import llava_fast as lf
from llava_fast.data.scenes import Scenes
from llava_fast.model import lora
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import PARTS
from llava_fast.train.distributed import World, joined, mesh_of
from llava_fast.train.recipe import recipe
from llava_fast.train.trainer import Trainer


def mixed(count: int = 84) -> list[dict[str, Any]]:
    """Samples with and without an image, unevenly: the last third has no image at all."""
    scenes = Scenes(count, 5)
    rows = []
    for i in range(count):
        if i % 3 and i < 2 * count // 3:
            rows.append(scenes[i])
        else:
            talk = [
                {"from": "human", "value": "Hi " * (1 + i % 9)},
                {"from": "gpt", "value": "A red form. " * (1 + i % 5)},
            ]
            rows.append({"id": f"text-{i}", "conversations": talk})
    return rows


def make_trainer(folder: Path, world: World | None, *, out: str, broken: bool = False, **changes: Any) -> Trainer:
    """A small model's Trainer; the same weights every time. ``broken``: half of the pictures cannot be read."""
    tiny = lf.ModelConfig.preset("tiny")
    config = tiny.replace(
        text=dataclasses.replace(tiny.text, num_hidden_layers=2, max_position_embeddings=512),
        vision=dataclasses.replace(tiny.vision, num_hidden_layers=2),
        projector="mlp2x_gelu",
    )
    options = {"batch_size": 8, "epochs": 2, "lr": 1e-3, "log_every": 3, "save_every": 5, "workers": 0, **changes}
    chosen = recipe("paper-stage2" if options.get("stage") == 2 else "paper-stage1", template="v1", **options)
    processor = Processor.from_config(config, Tokenizer.load(PARTS / "decoder"))
    held_out = Scenes(5, 6)
    model = lf.Llava(config, seed=1)
    if chosen.lora_rank:
        lora.attach(model, chosen.lora(base=str(folder)), seed=chosen.seed)
    samples = mixed()
    for row in [row for row in samples if "image" in row][::2] if broken else ():
        row["image"] = str(folder / "missing.png")
    return Trainer(model, processor, chosen, samples, folder / out, eval_samples=held_out, world=world)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as (world, device):
        for text in sys.argv[2:]:
            run = json.loads(text)
            die_at = run.pop("die_at", None)  # (rank, step): this rank is killed there, the first time
            mesh = mesh_of(device, world.size, run.get("shard_size", world.size))
            trainer = make_trainer(folder, dataclasses.replace(world, mesh=mesh), **run)
            if die_at and world.rank == die_at[0] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                kill_at(trainer, die_at[1])
            trainer.run()


def kill_at(trainer: Trainer, step: int) -> None:
    honest = trainer.train_step

    def dying(*inputs):
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*inputs)

    trainer.train_step = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
