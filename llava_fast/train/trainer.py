"""One training stage: the loop, its evaluation, its checkpoints and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import threading
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_fast.batch import PackedBatch
from llava_fast.checkpoint import save_projector
from llava_fast.checkpoint.files import write_json
from llava_fast.data.dealing import Share, deal
from llava_fast.data.feature_cache import CachedFeatures, cached_processor
from llava_fast.data.loader import EncodeOptions, Plan, SampleSource, fingerprint, load_steps, measure_sizes, plan_run
from llava_fast.errors import ConfigError, LlavaError, SampleError, TrainingError
from llava_fast.interrupt import Interrupted, interrupts
from llava_fast.model import Llava
from llava_fast.pretrained import save
from llava_fast.processor import Processor
from llava_fast.train import checkpoints
from llava_fast.train.distributed import World, empty_batch, gathered, share_out
from llava_fast.train.flops import peak_of, sample_flops, step_flops
from llava_fast.train.log import Log, NoLog, plot_losses
from llava_fast.train.memory import Estimate, estimate
from llava_fast.train.optimizer import MasterAdamW, cosine
from llava_fast.train.profile import Profiler
from llava_fast.train.recipe import Recipe
from llava_fast.train.sharded_checkpoints import ShardWriter, find_newest, read
from llava_fast.train.stages import freeze, trained

SMALL = 100_000_000  # parameters below which nobody asks whether they fit


@dataclass
class StepResult:
    """One optimizer step, its numbers still on the device."""

    step: int
    loss: Tensor  # () mean over the supervised tokens of the global batch
    grad_norm: Tensor  # ()
    sample_ids: list[str]
    tokens: int
    supervised: int
    flops: float
    lr: float


class Trainer:
    """Trains one stage.

    Args:
        model: on the device and in the dtype to compute in. The vision tower is frozen; stage 1 trains the projector,
            stage 2 the projector and the decoder.
        processor: the model's.
        recipe: every choice of the stage.
        samples: LLaVA JSON samples.
        out: folder of the run. A run that was started there with the same recipe and data goes on.
        eval_samples: held-out samples whose loss is taken during the run.
        wandb: Weights & Biases project.
        world: the processes that train together; default this one alone. Every one makes its Trainer, with the same
            model, recipe and samples.
    """

    def __init__(
        self,
        model: Llava,
        processor: Processor,
        recipe: Recipe,
        samples: SampleSource,
        out: Path,
        *,
        eval_samples: SampleSource | None = None,
        wandb: str | None = None,
        world: World | None = None,
    ):
        self.model, self.recipe, self.samples, self.out = model, recipe, samples, out
        self.world = world or World()
        self.dtype = model.dtype  # to compute in
        self.processor = processor
        self.eval_samples = eval_samples
        self.wandb = wandb
        self.options = EncodeOptions(recipe.mask, recipe.image_position, recipe.seed)
        self.workers = recipe.workers if recipe.workers is not None else default_workers(self.world.local_size)
        self.stop_asked = threading.Event()
        self.skipped: dict[str, str] = {}

    # ---- before the first step ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Freeze, measure, plan, share out, and take up the newest checkpoint."""
        torch.manual_seed(self.recipe.seed)  # of the adapters' dropout
        freeze(self.model, self.recipe.stage)
        self.adapters = sum(p.numel() for name, p in trained(self.model) if ".lora_" in name)
        if self.world.sharded and self.recipe.lora_bits:
            raise ConfigError("--lora-bits works in one process only: codes of 4 bits cannot be shared out by FSDP2")
        self.model.decoder.checkpoint_activations = self.recipe.activation_checkpointing
        self.out.mkdir(parents=True, exist_ok=True)
        sizes = self.measure()
        self.plan: Plan = plan_run(
            sizes[:, 0],
            batch_size=self.recipe.batch_size,
            max_tokens=self.recipe.max_tokens,
            epochs=self.recipe.epochs,
            seed=self.recipe.seed,
        )
        self.world.on_main(lambda: self.claim_folder(fingerprint(sizes[:, 0])))
        self.share: Share | None = None
        self.memory = self.estimate_memory(sizes)
        self.loading = self.cached() if self.recipe.feature_cache else self.processor  # what makes the batches
        if self.world.sharded:
            self.join(sizes)
        folder, keep = self.out / "checkpoints", self.recipe.keep
        self.writer = ShardWriter(folder, keep, self.world) if self.world.sharded else checkpoints.Writer(folder, keep)
        if self.recipe.compile:
            self.model.decoder.compile_layers()
        self.optimizer = MasterAdamW(
            trained(self.model),
            lr=self.recipe.lr,
            projector_lr=self.recipe.projector_lr,
            weight_decay=self.recipe.weight_decay,
            grad_clip=self.recipe.grad_clip,
            kind=self.recipe.optimizer,
        )
        self.step, self.seconds, self.tokens, self.supervised = 0, 0.0, 0, 0
        self.saved_at: Path | None = None
        self.resume()

    def measure(self) -> np.ndarray:
        """Tokens, supervised tokens and images of every sample, (n, 3); the ranks share the work."""
        rank, ranks = self.world.rank, self.world.size
        mine = measure_sizes(self.samples, self.processor, self.options, self.workers, rank=rank, ranks=ranks)
        sizes = np.zeros((len(self.samples), 3), dtype=np.int64)
        for i, (part, bad) in enumerate(self.world.gather(mine)):
            sizes[i::ranks] = part
            self.note_bad(bad)
        return sizes

    def cached(self) -> Processor:
        """The processor with features in the place of pixels. Rank 0 makes the cache, all ranks map it."""
        assert self.recipe.feature_cache is not None
        folder = Path(self.recipe.feature_cache)
        dtype = getattr(torch, self.recipe.feature_cache_dtype)
        image = self.world.on_main(
            lambda: cached_processor(self.processor, self.model, self.samples, folder, dtype).image
        )
        if self.world.any(isinstance(image, CachedFeatures) and not image.features.exists()):
            raise ConfigError(
                f"--feature-cache {folder} is not on a file system that all nodes share; choose one that is"
            )
        changed = copy(self.processor)
        changed.image = image
        return changed

    def estimate_memory(self, sizes: np.ndarray) -> Estimate | None:
        """Of the device, told before the start; None for models that fit anywhere."""
        if sum(p.numel() for p in self.model.parameters()) < SMALL or not self.world.main:
            return None
        bins = [indices for step in self.plan.steps[:2000] for _, indices in step]
        tokens, supervised, images = np.max([sizes[indices].sum(axis=0) for indices in bins], axis=0).tolist()
        return estimate(
            self.model,
            stage=self.recipe.stage,
            dtype=self.dtype,
            tokens=tokens,
            supervised=supervised,
            images=images,
            shards=(self.recipe.shard_size or self.world.local_size) if self.world.sharded else 0,
            shard_frozen=self.recipe.shard_frozen,
            optimizer=self.recipe.optimizer,
        )

    def how_to_save_memory(self) -> str:
        """What to change when the device's memory does not suffice, cheapest first."""
        recipe = self.recipe
        cures = [f"lower --max-tokens (now {recipe.max_tokens})"]
        stronger = {"none": "selective or full", "selective": "full", "full": ""}[recipe.activation_checkpointing]
        if stronger:
            cures.append(f"give --activation-checkpointing {stronger} (now {recipe.activation_checkpointing})")
        if recipe.stage == 1 and self.world.sharded and not (recipe.shard_frozen or recipe.fp8_frozen):
            cures.append("give --shard-frozen: the frozen decoder then lies on all devices together")
        if recipe.stage == 2 and recipe.optimizer == "adamw":
            cures.append("give --optimizer adamw-8bit or adamw-offload: moments in 8 bits, or on the host")
        if recipe.stage == 2 or not self.world.sharded:
            cures.append(f"share the weights among more devices with torchrun (now {self.world.size})")
        return "; ".join(cures) + (f"\n{self.memory}" if self.memory else "")

    def join(self, sizes: np.ndarray) -> None:
        """Take this rank's share of the data and of the weights."""
        ranks = self.world.size
        if self.recipe.batch_size < ranks:
            raise ConfigError(
                f"batch_size={self.recipe.batch_size} leaves some of {ranks} processes without a sample; "
                f"raise --batch-size to {ranks} or more, or start fewer"
            )
        if self.world.any(not (self.out / "run.json").exists()):
            raise ConfigError(f"--out {self.out} is not on a file system that all nodes share; choose one that is")
        costs = sample_flops(self.model.config, sizes, self.recipe.stage == 2)
        self.share = deal(
            self.plan, sizes[:, 0], costs, rank=self.world.rank, ranks=ranks, max_tokens=self.recipe.max_tokens
        )
        share_out(
            self.model,
            self.world,
            train_decoder=self.recipe.stage == 2,
            shard_frozen=self.recipe.shard_frozen,
        )

    def claim_folder(self, data: str) -> None:
        """Remember what run this folder is of; refuse to go on with a different one."""
        free = (
            *("workers", "log_every", "save_every", "keep", "eval_every", "shard_size", "shard_frozen"),
            *("activation_checkpointing", "compile", "profile", "optimizer", "feature_cache"),
        )  # these change nothing that is learned, or its rounding alone
        chosen = {k: v for k, v in dataclasses.asdict(self.recipe).items() if k not in free}
        mine = {"recipe": chosen, "data": data, "model": dataclasses.asdict(self.model.config)}
        mine = json.loads(json.dumps(mine))
        path = self.out / "run.json"
        if not path.exists():
            write_json(path, mine)
            return
        theirs = json.loads(path.read_text())
        known = {f.name: f.default for f in dataclasses.fields(Recipe)}  # what options newer than the run stand at
        theirs["recipe"] = {k: v for k, v in {**known, **theirs["recipe"]}.items() if k not in free}
        if theirs != mine:
            old, new = flat(theirs), flat(mine)
            changed = [f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in new if old.get(k) != new[k]]
            raise ConfigError(
                f"{self.out} holds a run of other settings ({'; '.join(changed[:5])}); "
                f"give the same settings to go on, another --out, or --fresh to start over"
            )

    def resume(self) -> None:
        found = find_newest(self.out / "checkpoints", self.world)
        self.resumed_from: int | None = None
        if found is None:
            return
        path, state, faults = found
        for fault in faults if self.world.main else ():
            print(f"passed over: {fault}")
        self.optimizer.load(read(path, self.world, self.optimizer.layout))
        self.step = self.resumed_from = state["step"]
        self.seconds, self.tokens, self.supervised = state["seconds"], state["tokens"], state["supervised"]
        self.skipped = dict(state["skipped"])
        self.saved_at = path
        if not self.world.sharded and "rng" in state:
            checkpoints.set_rng_state(state["rng"])

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns what summary.json holds.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint is written.
            TrainingError: the loss or the gradient is no longer finite.
            SampleError: a sample cannot be used and ``on_bad_sample`` is "stop".
        """
        self.prepare()
        total = len(self.plan.steps)
        title = f"stage {self.recipe.stage}"
        self.log: Log | NoLog = Log(self.out, self.step, total, title, self.wandb) if self.world.main else NoLog()
        self.log.say(self.opening(total))
        pending: list[StepResult] = []
        started = self.clock = time.perf_counter()
        before = self.seconds
        profiler = Profiler(self.out, self.model.device) if self.recipe.profile and self.world.main else None
        try:
            with interrupts(self.stop_asked, patience=5.0 if self.world.sharded else 0.0):
                for batches, bad in self.load():
                    if self.world.any(bool(bad)):
                        for found in self.world.gather(bad):
                            self.note_bad(found)
                    pending.append(self.train_step(batches, total))
                    self.step += 1
                    if profiler:
                        profiler.step()
                    self.seconds = before + time.perf_counter() - started
                    last = self.step == total
                    stop = self.world.any(self.stop_asked.is_set())  # all ranks stop after the same step
                    save_now = last or self.step % self.recipe.save_every == 0 or stop
                    eval_now = self.eval_samples is not None and (last or self.step % self.recipe.eval_every == 0)
                    if save_now or eval_now or self.step % self.recipe.log_every == 0:
                        self.report(pending)
                    if eval_now:
                        self.evaluate()
                    if save_now:
                        self.save()
                    if stop and not last:
                        self.await_saved()
                        raise Interrupted(f"stopped at step {self.step} of {total}; saved in {self.saved_at}")
                    self.log.bar.update()
            return self.finish()
        except torch.OutOfMemoryError as error:
            error.add_note(self.how_to_save_memory())
            raise
        finally:
            if profiler:
                profiler.close()
            self.log.close()

    def load(self) -> Iterator[tuple[list[PackedBatch], list[tuple[str, str]]]]:
        """The batches of every step that is left; on several ranks as many a step on each, some of them maybe empty."""
        plan = self.share.plan if self.share else self.plan
        for bins, (batches, bad) in zip(plan.steps[self.step :], self.load_share(plan), strict=True):
            if self.share:
                batches = batches + [empty_batch(self.model.config)] * (len(bins) - len(batches))
            yield batches, bad

    def load_share(self, plan: Plan) -> Iterator[tuple[list[PackedBatch], list[tuple[str, str]]]]:
        return load_steps(
            self.samples,
            self.loading,
            plan,
            self.options,
            start=self.step,
            workers=self.workers,
            pin_memory=self.model.device.type == "cuda",
        )

    def train_step(self, batches: list[PackedBatch], total: int) -> StepResult:
        """Forward and backward over the bins of the step, then one update.

        The loss is the mean over all supervised tokens of the global batch: each bin's sum is divided by their count
        over all bins, so a bin with few answers does not weigh as much as one with many. Ranks add up their counts and
        their gradients; what is told of the step here is this rank's part.
        """
        supervised = sum(batch.num_supervised for batch in batches)
        denominator: int | Tensor = supervised
        if self.world.sharded:
            torch.manual_seed(self.recipe.seed + 1_000_003 * self.step + self.world.rank)  # whatever was before
            count = torch.full((), float(supervised), device=self.model.device)
            denominator = self.world.sum(count).clamp(min=1)
        loss = torch.zeros((), device=self.model.device)
        flops = 0.0
        for batch in batches:
            batch = batch.to(self.model.device, self.dtype)
            part = self.model.loss(batch, denominator=denominator)
            part.backward()
            loss += part.detach()
            flops += step_flops(self.model.config, batch, self.recipe.stage == 2 and not self.adapters, self.adapters)
        factor = cosine(self.step, total, self.recipe.warmup_ratio)
        norm = self.optimizer.step(factor) if batches else torch.zeros_like(loss)
        return StepResult(
            step=self.step + 1,
            loss=loss,
            grad_norm=norm,
            sample_ids=[i for batch in batches for i in batch.sample_ids],
            tokens=sum(b.num_tokens for b in batches if b.num_supervised),  # not of what fills an empty place
            supervised=supervised,
            flops=flops,
            lr=self.recipe.lr * factor,
        )

    # ---- telling -----------------------------------------------------------------------------------------------------

    def opening(self, total: int) -> str:
        decoder = "LoRA adapters of the decoder" if self.adapters else "the decoder"
        names = {1: "the projector", 2: f"the projector and {decoder}"}
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        lines = [
            f"stage {self.recipe.stage}: training {names[self.recipe.stage]} ({count:,} parameters) on "
            f"{len(self.samples)} samples, {self.recipe.epochs} epoch(s), {total} steps",
            f"bins of {self.plan.bin_tokens} tokens, {self.plan.fill:.1%} full; {self.model.device}, "
            f"{str(self.dtype).removeprefix('torch.')}; {self.workers} data worker(s)",
        ]
        if self.share and self.world.mesh is not None:
            shape = " x ".join(map(str, self.world.mesh.shape))
            lines.append(
                f"{self.world.size} processes (mesh {shape}); in a pass the average bin holds {self.share.fill:.1%} of "
                f"the fullest one's tokens, the dearest costs {self.share.spread:.3f} of the average one's work"
            )
        if self.memory:
            lines.append(str(self.memory))
            if self.model.device.type == "cuda":
                there = torch.cuda.get_device_properties(self.model.device).total_memory
                if self.memory.total > 0.95 * there:
                    lines.append(f"of {there / 1e9:.0f} GB; it may not suffice: {self.how_to_save_memory()}")
        if self.resumed_from is not None:
            lines.append(f"going on from {self.saved_at}")
        return "\n".join(lines)

    def report(self, pending: list[StepResult]) -> None:
        """Fetch the numbers of the steps since the last report, check them, write them down: the one host sync."""
        if not pending:
            return
        seconds = time.perf_counter() - self.clock
        losses, norms = self.fetch(pending)
        for result, loss, norm in zip(pending, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.stop_for(result, loss, norm)
            self.tokens += result.tokens
            self.supervised += result.supervised
            self.log.record(
                step=result.step,
                loss=loss,
                lr=result.lr,
                grad_norm=norm,
                tokens=result.tokens,
                supervised_tokens=result.supervised,
            )
        speed = {
            "tokens_per_s": sum(r.tokens for r in pending) / seconds,
            "supervised_tokens_per_s": sum(r.supervised for r in pending) / seconds,
            "memory_gb": memory_gb(self.model.device),
        }
        peak = peak_of(self.model.device)
        if peak:
            speed["model_flop_utilisation"] = sum(r.flops for r in pending) / seconds / peak / self.world.size
        self.log.record(step=self.step, **speed)
        self.log.flush()
        used = f"  MFU {speed['model_flop_utilisation']:.1%}" if peak else ""
        self.log.say(
            f"step {self.step:>6}  loss {sum(losses) / len(losses):.4f}  lr {pending[-1].lr:.2e}  "
            f"grad {norms[-1]:.3f}  {speed['supervised_tokens_per_s']:,.0f} supervised of "
            f"{speed['tokens_per_s']:,.0f} tokens/s{used}  {speed['memory_gb']:.2f} GB"
        )
        pending.clear()
        self.clock = time.perf_counter()

    def fetch(self, pending: list[StepResult]) -> tuple[list[float], list[float]]:
        """Losses and gradient norms of the steps, on the host; on several ranks the losses, and each result's counts in
        place, are those of all ranks together."""
        losses = torch.stack([r.loss for r in pending])
        norms = torch.stack([r.grad_norm for r in pending]).tolist()
        if not self.world.sharded:
            return losses.tolist(), norms
        counts = [[r.tokens, r.supervised, r.flops] for r in pending]
        told = torch.tensor(counts, dtype=torch.float64).to(losses.device)  # (steps, 3)
        told = self.world.sum(torch.cat((losses.double().unsqueeze(1), told), dim=1))
        for result, (_, tokens, supervised, flops) in zip(pending, told.tolist(), strict=True):
            result.tokens, result.supervised, result.flops = int(tokens), int(supervised), flops
        return told[:, 0].tolist(), norms

    def stop_for(self, result: StepResult, loss: float, norm: float) -> None:
        ids = [sample for ids in self.world.gather(result.sample_ids) for sample in ids]
        shown = ", ".join(ids[:20]) + (", ..." if len(ids) > 20 else "")
        self.await_saved()
        good = self.saved_at or "none was written yet"
        raise TrainingError(
            f"step {result.step}: loss is {loss}, gradient norm {norm}; the samples of the step are {shown}; "
            f"the last good checkpoint is {good}. Lower --lr, or look at these samples"
        )

    def note_bad(self, bad: list[tuple[str, str]]) -> None:
        """Stop at, or skip and count, samples that cannot be used."""
        for sample_id, why in bad:
            if self.recipe.on_bad_sample == "stop":
                raise SampleError(sample_id, f"{why} (--on-bad-sample skip leaves such samples out)")
            if sample_id not in self.skipped:
                self.skipped[sample_id] = why
                if self.world.main:
                    print(f"skipped sample {sample_id!r}: {why}")

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean loss over the supervised tokens of the held-out samples."""
        assert self.eval_samples is not None
        loss = held_out_loss(self.model, self.processor, self.recipe, self.eval_samples, self.workers, self.world)
        self.log.record(step=self.step, eval_loss=loss)
        self.log.flush()
        self.log.say(f"step {self.step:>6}  held-out loss {loss:.4f}")
        self.clock = time.perf_counter()

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        state: dict[str, Any] = {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "skipped": dict(self.skipped),
        }
        if not self.world.sharded:
            state["rng"] = checkpoints.rng_state()
        self.writer.save(self.step, self.optimizer.state(), state)
        self.clock = time.perf_counter()

    def await_saved(self) -> None:
        """Until the checkpoint that was begun last is whole."""
        self.writer.wait()
        self.saved_at = self.writer.published or self.saved_at

    def finish(self) -> dict[str, Any]:
        """Write what the stage is for, the plot and summary.json; every rank gets what rank 0 wrote."""
        self.log.say("writing the result")
        self.await_saved()
        model: Llava | None = self.model
        if self.world.sharded:
            whole = self.recipe.stage == 2 and not self.adapters
            names = {name for name, p in self.model.named_parameters() if whole or p.requires_grad}
            model = gathered(self.model, self.world, names, self.dtype)
        return self.world.on_main(lambda: self.write_result(model))

    def write_result(self, model: Llava | None) -> dict[str, Any]:
        assert model is not None
        if self.recipe.stage == 1:
            result = self.out / "projector.safetensors"
            save_projector(model, result)
        else:
            result = self.out / ("adapter" if self.adapters else "model")
            save(model, self.processor, result)
        steps = [r for r in self.log.records if "loss" in r]
        plot_losses(self.log.records, self.out / "loss.png", f"stage {self.recipe.stage}")
        tail = [r["loss"] for r in steps[-max(1, len(steps) // 10) :]]
        held_out = [r["eval_loss"] for r in self.log.records if "eval_loss" in r]
        summary = {
            "stage": self.recipe.stage,
            "result": str(result),
            "steps": len(steps),
            "samples": len(self.samples),
            "samples_skipped": len(self.skipped),
            "first_loss": steps[0]["loss"],
            "final_loss": sum(tail) / len(tail),  # mean over the last tenth
            "eval_loss": held_out[-1] if held_out else None,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / self.seconds,
            "supervised_tokens_per_s": self.supervised / self.seconds,
            "bin_fill": self.plan.fill,
            "processes": self.world.size,
            "rank_fill": self.share.fill if self.share else 1.0,
            "rank_spread": self.share.spread if self.share else 1.0,
            "losses": [r["loss"] for r in steps],
        }
        write_json(self.out / "summary.json", summary)
        return summary


def held_out_loss(
    model: Llava,
    processor: Processor,
    recipe: Recipe,
    samples: SampleSource,
    workers: int,
    world: World | None = None,
) -> float:
    """Mean cross entropy over the supervised tokens of ``samples``, images where the data puts them."""
    world = world or World()
    options = EncodeOptions(recipe.mask, "as_written", recipe.seed)
    sizes, _ = world.on_main(lambda: measure_sizes(samples, processor, options, workers))
    lengths = sizes[:, 0]
    plan = plan_run(lengths, batch_size=len(samples), max_tokens=recipe.max_tokens, epochs=1, seed=0)
    if world.sharded:
        costs = sample_flops(model.config, sizes, True)
        plan = deal(plan, lengths, costs, rank=world.rank, ranks=world.size, max_tokens=recipe.max_tokens).plan
    told = torch.zeros(2, dtype=torch.float64)  # sum of losses, supervised tokens
    for bins, (batches, _) in zip(
        plan.steps, load_steps(samples, processor, plan, options, workers=workers), strict=True
    ):
        spare = len(bins) - len(batches) if world.sharded else 0
        for batch in batches + [empty_batch(model.config)] * spare:
            loss = model.loss(batch.to(model.device, None if world.sharded else model.dtype), denominator=1)
            told += torch.tensor([loss.item(), batch.num_supervised])
    total, count = world.sum(told.to(model.device)).tolist()
    if not count:
        raise LlavaError("the evaluation data has no usable sample")
    return total / count


def default_workers(ranks: int) -> int:
    """One a core up to 8, less the main one, of the cores that each of ``ranks`` processes on this node has."""
    return min(8, max(0, (os.cpu_count() or 1) // ranks - 1))


def memory_gb(device: torch.device) -> float:
    """Peak memory: of the card on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}" if prefix else key).items()}
