"""Training LLaVA-1.5-7B with random weights on one GPU: stage 1, stage 1 in FP8, stage 2, and transformers beside them.

    python -m benches.train_7b --out train-7b                      # on a GPU of 140 GB, some minutes
    python -m benches.train_7b --out train-7b --parts stage1,stage1_fp8,losses
    python -m benches.train_7b --out /tmp/tiny --size tiny         # the same script on a CPU, for its own sake

The program's own Trainer is driven: its loader, packing, step and optimizer. Lengths are real (benches/lengths.py),
tokens are random, and pictures are JPEG files that the data workers decode, resize and crop while the device computes.
transformers gets the same samples in padded batches, which lie on the device beforehand; no picture is decoded in its
loop, and its AdamW keeps everything in bf16, which is less work and less memory than our float32 masters.

What is tried first is what is fastest; where the estimate of memory says no, or the device does, the next rung of
LADDER is taken, and the result names it. Stage 2 holds 18 bytes a parameter: bf16 weights, and float32 masters, two
moments and gradient sums. These are 122 GB of the 7B model, which leave an H200 room for bins of 4,096 tokens with the
cheap part of the layers computed anew. Where that is too much, moments in 8 bits are 6 bytes fewer, if this version has
them (``--optimizer adamw-8bit``); a card of 80 GB needs more cards beside it, or the host's memory.

Each part stands alone: one that fails is reported with its error and the others go on. Results are on the disk as soon
as their part ends. Model FLOPs leave out recomputation and whatever is not needed (llava_fast/train/flops.py), and are
held against a large product measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import llava_fast as lf
from benches.ceiling import matmul_ceiling
from benches.lengths import Row, of_stage, sizes
from benches.training import Sample, Transformers, make_samples, with_image_token
from llava_fast.checkpoint.files import write_json
from llava_fast.checkpoint.huggingface import config_fields
from llava_fast.config import IGNORE
from llava_fast.processor import Encoded, Processor, Tokenizer
from llava_fast.train import memory
from llava_fast.train.flops import peak_of, sample_flops
from llava_fast.train.recipe import Recipe, recipe
from llava_fast.train.stages import freeze
from llava_fast.train.trainer import StepResult, Trainer

SIZES = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b", "tiny": "tiny"}
PARTS = ("stage1", "stage1_fp8", "stage2", "transformers_stage1", "transformers_stage2", "losses")
LADDER = [  # (most tokens of a bin, what is computed anew), the fastest first
    *((8192, "none"), (4096, "none"), (8192, "selective"), (4096, "selective"), (2048, "none"), (2048, "selective")),
    *((4096, "full"), (2048, "full")),
]
OPTIMIZERS = {"adamw": 0, "adamw-8bit": 6}  # by how many bytes a parameter each is smaller than float32 AdamW
THEIR_LADDER = [(16, False), (8, False), (16, True), (4, False), (8, True)]  # (samples of a batch, checkpointing)
MOST_STEPS = 400  # of a timed loop
WARM_UP = 3  # steps that compile, allocate and are not timed
PICTURES = 16  # JPEG files; samples share them
TOKENIZER = Path(lf.__file__).parent / "train" / "tiny" / "decoder"  # not used: tokens are random


class Setting:
    """The model's sizes, the device, and how long to measure.

    Args:
        size: one of SIZES.
        device: where to train.
        folder: for pictures and for what the trainer writes.
        seconds: that a loop is timed for, at least.
        batch_size: samples of an optimizer step.
        loss_steps: steps of the comparison of losses.
    """

    def __init__(self, size: str, device: torch.device, folder: Path, seconds: float, batch_size: int, loss_steps: int):
        self.config = with_image_token(lf.ModelConfig.preset(SIZES[size]))
        self.device, self.folder = device, folder
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.seconds, self.batch_size, self.loss_steps = seconds, batch_size, loss_steps
        self.pictures = make_pictures(folder / "pictures")
        self.runs = 0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory_total(self) -> float:
        """Bytes of the device; a CPU's are not looked at."""
        if self.device.type != "cuda":
            return float("inf")
        return torch.cuda.get_device_properties(self.device).total_memory

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def model(self) -> lf.Llava:
        return lf.Llava(self.config, device=self.device, dtype=self.dtype, seed=0)

    def longest(self) -> int:
        return max(int(sizes(of_stage(stage, 2500), self.config.tokens_per_image)[:, 0].max()) for stage in (1, 2))


def make_pictures(folder: Path) -> list[Path]:
    """JPEG files of 640 x 480 with the detail of a photograph: coarse colours under fine grain."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(PICTURES):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((640, 480))
        grain = random.normal(0, 12, (480, 640, 3))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


class RandomText(Processor):
    """A processor that gives samples tokens at random, in the numbers they ask for, and handles pictures as always."""

    def encode(self, sample: Any, **options: Any) -> Encoded:  # type: ignore[override]
        prompt, supervised, images = sample["row"]
        random = np.random.default_rng(sample["number"])
        text = random.integers(5, self.image_token_id, prompt + supervised)  # the id of images is the last one
        image = np.full(images * self.tokens_per_image, self.image_token_id)
        ids = np.concatenate([text[:5], image, text[5:]])
        labels = np.full(len(ids), IGNORE)
        labels[-1 - supervised : -1] = ids[len(ids) - supervised :]
        return Encoded(ids, labels, sample["images"], str(sample["number"]))


def ours(setting: Setting, stage: int, **changes: Any) -> dict[str, Any]:
    """Steps of our trainer with the first of the rungs that fits."""
    for rung in rungs(setting.config, stage, setting.dtype, setting.memory_total(), setting.longest()):
        try:
            return {**rung, **timed(setting, make_trainer(setting, stage, steps=MOST_STEPS, **rung, **changes))}
        except torch.OutOfMemoryError:
            print(f"  {rung}: out of memory", flush=True)
        setting.free()
    raise MemoryError(f"stage {stage} does not fit this device in any way that LADDER and OPTIMIZERS hold")


def rungs(
    config: lf.ModelConfig, stage: int, dtype: torch.dtype, total: float, longest: int
) -> Iterator[dict[str, Any]]:
    """Choices of a recipe whose estimate leaves 6% of ``total`` bytes free, the best first.

    Args:
        longest: tokens of the longest sample; bins have room for it.
    """
    model = lf.Llava(config, device="meta", dtype=dtype, seed=None)
    freeze(model, stage)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = sizes(of_stage(stage, 2000), config.tokens_per_image)
    for optimizer, bytes_fewer in OPTIMIZERS.items():
        if optimizer != "adamw" and (stage == 1 or missing("optimizer")):
            continue
        for max_tokens, checkpointing in LADDER:
            if max_tokens < longest:
                continue
            model.decoder.checkpoint_activations = checkpointing
            bin_of = (table.sum(axis=0) * max_tokens / table[:, 0].sum()).round().astype(int).tolist()
            counts = dict(zip(("tokens", "supervised", "images"), bin_of, strict=True))
            needed = memory.estimate(model, stage=stage, dtype=dtype, **counts).total - bytes_fewer * parameters
            if needed < 0.94 * total:
                chosen = {"max_tokens": max_tokens, "activation_checkpointing": checkpointing}
                yield chosen if optimizer == "adamw" else {**chosen, "optimizer": optimizer}


def make_trainer(setting: Setting, stage: int, *, steps: int, batch_size: int | None = None, **changes: Any) -> Trainer:
    """A trainer, prepared, of ``steps`` optimizer steps on the lengths of the stage."""
    batch_size = batch_size or setting.batch_size
    rows = of_stage(stage, steps * batch_size)
    samples = [
        {
            "number": i,
            "row": row,
            "images": [str(setting.pictures[(i + k) % PICTURES]) for k in range(row[2])],
        }
        for i, row in enumerate(rows)
    ]
    setting.runs += 1
    options = {"max_length": 4096, "batch_size": batch_size, "save_every": 10**9, "eval_every": 10**9, **changes}
    trainer = Trainer(
        model := setting.model(),
        random_text(Processor.from_config(setting.config, Tokenizer.load(TOKENIZER))),
        recipe(f"llava-1.5-stage{stage}", image_position="as_written", **options),
        samples,
        setting.folder / f"run-{setting.runs}",
    )
    trainer.prepare()
    if options.get("fp8_frozen"):
        in_fp8(model)
    return trainer


def random_text(processor: Processor) -> RandomText:
    """``processor`` itself, which from now on makes its tokens at random."""
    processor.__class__ = RandomText
    return processor  # type: ignore[return-value]


def in_fp8(model: lf.Llava) -> None:
    """Make sure that the frozen decoder is in FP8, whether the trainer or its command line turns it so."""
    from llava_fast.model import fp8

    if not any(isinstance(module, fp8.Fp8Linear) for module in model.modules()):
        fp8.freeze_decoder(model)


def missing(option: str) -> str | None:
    """Why a recipe's option cannot be used, None where it can."""
    known = {field.name for field in dataclasses.fields(Recipe)}
    return None if option in known else f"this version has no --{option.replace('_', '-')}"


def steps_of(trainer: Trainer, most: int) -> Iterator[tuple[list[lf.PackedBatch], StepResult]]:
    """The first steps as the trainer's own loop takes them, without checkpoints and evaluations; their batches too."""
    total = len(trainer.plan.steps)
    with closing(trainer.load()) as stream:  # its workers end with it  # type: ignore[type-var]
        for batches, bad in islice(stream, most):
            assert not bad, bad
            yield batches, trainer.train_step(batches, total)
            trainer.step += 1


def timed(setting: Setting, trainer: Trainer) -> dict[str, Any]:
    """Rates of the trainer's loop, with the data loaded in it; and of one step again and again, with none loaded."""
    done: list[StepResult] = []
    start = 0.0
    with closing(steps_of(trainer, len(trainer.plan.steps))) as steps:
        for batches, result in steps:
            last = batches
            done.append(result)
            if len(done) == WARM_UP:
                setting.synchronize()
                start = time.perf_counter()
            elif len(done) > WARM_UP and len(done) % 5 == 0:  # as often as a log line would wait for the device
                setting.synchronize()
                seconds = time.perf_counter() - start
                if seconds > setting.seconds:
                    break
    losses = torch.stack([r.loss for r in done]).tolist()
    done = done[WARM_UP:]
    peak = memory_gb(setting.device)

    repeats = max(1, min(5, len(done)))
    start = time.perf_counter()
    again = [trainer.train_step(last, len(trainer.plan.steps)) for _ in range(repeats)]
    setting.synchronize()
    loaded = sum(r.tokens for r in again) / (time.perf_counter() - start)
    return {
        **rates(
            setting,
            seconds,
            samples=sum(len(r.sample_ids) for r in done),
            tokens=sum(r.tokens for r in done),
            supervised=sum(r.supervised for r in done),
            flops=sum(r.flops for r in done),
        ),
        "steps": len(done),
        "seconds_per_step": seconds / len(done),
        "tokens_per_s_without_loading": loaded,
        "peak_memory_gb": peak,
        "bin_tokens": trainer.plan.bin_tokens,
        "bin_fill": trainer.plan.fill,
        "bins_per_step": len(last),
        "samples_per_step": trainer.recipe.batch_size,
        "workers": trainer.workers,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def rates(
    setting: Setting, seconds: float, *, samples: int, tokens: int, supervised: int, flops: float
) -> dict[str, Any]:
    """What a second gives. Tokens are those of the samples, padding is none of them."""
    rate = flops / seconds
    peak = peak_of(setting.device)
    return {
        "tokens_per_s": tokens / seconds,
        "supervised_tokens_per_s": supervised / seconds,
        "samples_per_s": samples / seconds,
        "model_tflop_per_s": rate / 1e12,
        "share_of_matmul_ceiling": rate / matmul_ceiling(setting.device, setting.dtype),
        "model_flop_utilisation": rate / peak if peak else None,
    }


def memory_gb(device: torch.device) -> float | None:
    """Most that was allocated since the last reset; None on a CPU, where the process held other models before."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def stage1_fp8(setting: Setting) -> dict[str, Any]:
    if why := missing("fp8_frozen"):
        return {"skipped": why}
    return ours(setting, 1, fp8_frozen=True)


def theirs(setting: Setting, stage: int) -> dict[str, Any]:
    """transformers on the first rung of THEIR_LADDER that fits."""
    rows = of_stage(stage, setting.batch_size)
    samples = make_samples(setting.config, rows)
    for micro, checkpointing in THEIR_LADDER:
        micro = min(micro, setting.batch_size)
        bins = [samples[i : i + micro] for i in range(0, len(samples), micro)]
        try:
            found = their_steps(setting, stage, rows, bins, checkpointing)
        except torch.OutOfMemoryError:
            print(f"  transformers, batches of {micro}, checkpointing {checkpointing}: out of memory", flush=True)
            setting.free()
            continue
        return {**found, "samples_per_batch": micro, "activation_checkpointing": "full" if checkpointing else "none"}
    raise MemoryError("no rung of THEIR_LADDER fits this device")


def their_steps(
    setting: Setting, stage: int, rows: list[Row], bins: list[list[Sample]], checkpointing: bool
) -> dict[str, Any]:
    run = Transformers(their_model(setting), stage, bins, setting.device, checkpointing=checkpointing)
    run.step()
    setting.synchronize()
    start, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - start < setting.seconds:
        loss = run.step()
        setting.synchronize()
        steps += 1
    seconds = (time.perf_counter() - start) / steps
    table = sizes(rows, setting.config.tokens_per_image)
    filled = table[:, 0].sum() / sum(len(b) * max(len(s.ids) for s in b) for b in bins)
    return {
        **rates(
            setting,
            seconds,
            samples=len(rows),
            tokens=int(table[:, 0].sum()),
            supervised=int(table[:, 1].sum()),
            flops=float(sample_flops(setting.config, table, stage == 2).sum()),
        ),
        "steps": steps,
        "seconds_per_step": seconds,
        "peak_memory_gb": memory_gb(setting.device),
        "batch_fill": float(filled),
        "samples_per_step": len(rows),
        "optimizer": f"AdamW with weights and moments in {str(setting.dtype).removeprefix('torch.')}",
        "last_loss": loss.item(),
    }


def their_model(setting: Setting) -> Any:
    """transformers' LLaVA of these sizes with its own random weights, made on the device."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_dict(config_fields(setting.config))
    with setting.device:
        return LlavaForConditionalGeneration._from_config(config, dtype=setting.dtype, attn_implementation="sdpa")


def losses(setting: Setting) -> dict[str, Any]:
    """The first losses of stage 1 in FP8 beside those in bf16: the same weights, samples and order."""
    if why := missing("fp8_frozen"):
        return {"skipped": why}
    found = {}
    for name, changes in {"bf16": {}, "fp8": {"fp8_frozen": True}}.items():
        trainer = make_trainer(
            setting, 1, steps=setting.loss_steps, batch_size=6, max_tokens=max(4096, setting.longest()), **changes
        )
        steps = [result.loss for _, result in steps_of(trainer, setting.loss_steps)]
        found[name] = torch.stack(steps).tolist()
        del trainer
        setting.free()
    bf16, fp8 = (np.array(found[name]) for name in ("bf16", "fp8"))
    apart = np.abs(fp8 / bf16 - 1)
    return {
        "steps": len(apart),
        "largest_relative_difference": float(apart.max()),
        "mean_relative_difference": float(apart.mean()),
        "within_1_percent": bool(apart.max() <= 0.01),
        **{f"losses_{name}": values for name, values in found.items()},
    }


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """What the goals are about, of the parts that are there."""

    def speed(part: str) -> float | None:
        return results.get(part, {}).get("supervised_tokens_per_s")

    pairs = {
        "stage1_over_transformers": ("stage1", "transformers_stage1"),
        "stage2_over_transformers": ("stage2", "transformers_stage2"),
        "fp8_over_bf16": ("stage1_fp8", "stage1"),
    }
    return {name: a / b for name, (x, y) in pairs.items() if (a := speed(x)) and (b := speed(y))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("train-7b"), help="folder of the results (default %(default)s)"
    )
    parser.add_argument("--size", choices=SIZES, default="7b", help="of the model (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=8.0, help="that each loop is timed for (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of an optimizer step (default %(default)s)")
    parser.add_argument("--loss-steps", type=int, default=200, help="of FP8 beside bf16 (default %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no part is begun")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.loss_steps < 1:
        parser.error("--batch-size and --loss-steps must be at least 1")
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; choose of {', '.join(PARTS)}")
    began, device = time.perf_counter(), torch.device(args.device)
    if args.size != "tiny" and device.type != "cuda":
        parser.error(f"--size {args.size} needs a GPU; --size tiny runs on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args.size, device, Path(folder), args.seconds, args.batch_size, args.loss_steps)
        return run(setting, args.parts.split(","), args.out / "train_7b.json", args.size, began + args.budget)


def run(setting: Setting, parts: list[str], path: Path, size: str, ends: float) -> int:
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "stage1": lambda: ours(setting, 1),
        "stage1_fp8": lambda: stage1_fp8(setting),
        "stage2": lambda: ours(setting, 2),
        "transformers_stage1": lambda: theirs(setting, 1),
        "transformers_stage2": lambda: theirs(setting, 2),
        "losses": lambda: losses(setting),
    }
    cuda = setting.device.type == "cuda"
    results: dict[str, Any] = {
        "model": SIZES[size],
        "device": torch.cuda.get_device_name(setting.device) if cuda else "cpu",
        "torch": torch.__version__,
        "dtype": str(setting.dtype),
        "matmul_ceiling_tflop_per_s": matmul_ceiling(setting.device, setting.dtype) / 1e12,
    }
    for name in parts:
        setting.free()
        try:
            in_time = time.perf_counter() < ends
            results[name] = work[name]() if in_time else {"skipped": "no time left (--budget)"}
        except KeyboardInterrupt:
            write_json(path, results)
            print(f"stopped in {name}; the parts before it are in {path}", file=sys.stderr)
            return 130
        except Exception as error:
            traceback.print_exc()
            # The traceback holds the frames, and the frames hold the model: no memory would come back.
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            del error
        results["ratios"] = ratios(results)
        write_json(path, results)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in results[name].items() if "losses_" not in k}
        print(f"{name:20}", json.dumps(shown), flush=True)
    print(f"{'ratios':20}", json.dumps(results.get("ratios", {})))
    return int(any("error" in results[name] for name in parts))


if __name__ == "__main__":
    sys.exit(main())
