"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases when asked, a progress bar, and loss.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_fast.errors import ConfigError


class Log:
    """Writes one record a step. On resumption, records past the checkpoint's step are dropped first.

    Args:
        folder: of the run.
        start: steps that the checkpoint holds; records of later steps are forgotten.
        total: steps of the whole run.
        wandb: project name for Weights & Biases, or None.

    Raises:
        ConfigError: wandb is asked for and not installed.
    """

    def __init__(self, folder: Path, start: int, total: int, title: str, wandb: str | None = None):
        self.path = folder / "metrics.jsonl"
        self.records = [r for r in read(self.path) if r["step"] <= start]
        temporary = self.path.with_suffix(".part")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        temporary.replace(self.path)
        self.file = self.path.open("a")
        self.board = _tensorboard(folder / "tensorboard", start)
        self.wandb = _wandb(wandb, folder) if wandb else None
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", dynamic_ncols=True)

    def record(self, **values: Any) -> None:
        """One record; ``step`` is among the values."""
        self.records.append(values)
        self.file.write(json.dumps(values) + "\n")
        numbers = {k: v for k, v in values.items() if k != "step" and isinstance(v, int | float)}
        for name, value in numbers.items():
            self.board.add_scalar(name, value, values["step"])
        if self.wandb:
            self.wandb.log(numbers, step=values["step"])

    def flush(self) -> None:
        self.file.flush()

    def say(self, line: str) -> None:
        """A line on the terminal, above the progress bar."""
        self.bar.write(line)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()


class NoLog:
    """What every rank but the first tells: nothing."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.bar = tqdm(disable=True)

    def record(self, **values: Any) -> None: ...

    def flush(self) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _tensorboard(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import; only training needs it

    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("Weights & Biases is not installed; pip install wandb, or leave out --wandb") from None
    return wandb.init(project=project, dir=str(folder), name=folder.name, resume="allow")


def plot_losses(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """loss.png: the loss of every step, its running mean, the evaluation loss, and the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r["step"] for r in records if "loss" in r]
    losses = [r["loss"] for r in records if "loss" in r]
    smooth: list[float] = []
    mean = losses[0]
    for loss in losses:
        mean += (loss - mean) * max(0.1, 1 / (len(smooth) + 1))
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(steps, losses, color="#b8c4d6", linewidth=1, label="loss of a step")
    axes.plot(steps, smooth, color="#1f4e9c", linewidth=2, label="running mean")
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c2571a", markersize=4, label="held-out loss")
    axes.set(xlabel="optimizer step", ylabel="cross entropy a supervised token", title=title)
    axes.set_ylim(0, max(smooth) * 1.1)
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(steps, [r["lr"] for r in records if "loss" in r], color="#7a9e7e", linewidth=1, linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
