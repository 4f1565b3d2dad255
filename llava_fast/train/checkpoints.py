"""Checkpoints of a run: written beside and renamed, checked by size and checksum, the newest whole one is taken up."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_fast.errors import CheckpointError

TENSORS, STATE, MANIFEST, LATEST = "tensors.safetensors", "state.json", "manifest.json", "latest"


class Writer:
    """Writes checkpoints into ``folder`` while training goes on, one at a time; ``keep`` of them remain.

    A run that dies at any moment leaves either the whole checkpoint under its name or nothing under it.

    Attributes:
        published: the newest one that is whole on the disk.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.published: Path | None = None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy ``tensors`` to the host's memory, and write them while the caller goes on.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.begin(lambda: save(self.folder, step, copies, state, self.keep))

    def begin(self, work: Callable[[], Path]) -> None:
        """Run ``work``, which gives the finished checkpoint's path, in a thread."""

        def run() -> None:
            try:
                self.published = work()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until what was begun is whole on the disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise CheckpointError(
                f"the checkpoint could not be written under {self.folder} ({type(self.error).__name__}: {self.error}); "
                f"is the disk full?"
            ) from self.error


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` under ``folder``; afterwards ``latest`` names it and ``keep`` remain.

    A run that dies at any moment leaves either the whole checkpoint under its name or nothing under it.
    """
    final = folder / f"step-{step:08d}"
    beside = folder / f".{final.name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, beside / TENSORS)
    (beside / STATE).write_text(json.dumps({"step": step, **state}))
    manifest = {name: _describe(beside / name) for name in (TENSORS, STATE)}
    (beside / MANIFEST).write_text(json.dumps(manifest))
    for name in (TENSORS, STATE, MANIFEST):
        _flush(beside / name)
    if final.exists():  # a damaged one of the same step, from before
        shutil.rmtree(final)
    os.replace(beside, final)
    _flush(folder)
    point_to(folder, final.name)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def point_to(folder: Path, name: str) -> None:
    temporary = folder / f".{LATEST}.part"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, folder / LATEST)


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Tensors and state of the newest whole checkpoint, and one line on each damaged one that was passed over.

    Returns None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    faults: list[str] = []
    candidates = _all(folder)[::-1]
    for path in candidates:
        try:
            check(path)
            return load_file(path / TENSORS), json.loads((path / STATE).read_text()), faults
        except CheckpointError as error:
            faults.append(str(error))
    if candidates:
        raise CheckpointError("; ".join(faults) + "; no whole checkpoint is left: start again with --fresh")
    return None


def check(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Raises CheckpointError naming the file when anything in the checkpoint ``path`` is missing or differs.

    ``share`` (i, n): every n-th file from the i-th on, for one of n processes that check together.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable {MANIFEST} ({type(error).__name__})") from None
    for name, expected in [*manifest.items()][share[0] :: share[1]]:
        file = path / name
        if not file.exists():
            raise CheckpointError(f"checkpoint {path} lacks {name}")
        found = _describe(file)
        if found != expected:
            what = "truncated" if found["size"] < expected["size"] else "damaged"
            raise CheckpointError(f"checkpoint {path}: {name} is {what} ({found} instead of {expected})")


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.exists() else []


def _describe(path: Path) -> dict[str, int]:
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return {"size": size, "crc32": crc}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def rng_state() -> dict[str, list[int]]:
    state = {"torch": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def set_rng_state(state: dict[str, list[int]]) -> None:
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
