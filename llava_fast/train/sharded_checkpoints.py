"""Checkpoints of a run on several processes: each writes its shards while training goes on; any number reads them.

The shards are in the format of ``torch.distributed.checkpoint``; around them stands what
:mod:`llava_fast.train.checkpoints` has around a file of one process: a state, sizes and checksums of every file, a
folder that is renamed when it is whole. ``--out`` must be on a file system that all nodes share.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from llava_fast.errors import CheckpointError
from llava_fast.train import checkpoints
from llava_fast.train.checkpoints import MANIFEST, STATE, TENSORS
from llava_fast.train.distributed import World

METADATA = ".metadata"  # torch.distributed.checkpoint's own, written last


class ShardWriter(checkpoints.Writer):
    """The same of all ranks together."""

    def __init__(self, folder: Path, keep: int, world: World):
        super().__init__(folder, keep)
        self.world = world

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Every rank calls it."""
        import torch.distributed.checkpoint as dcp  # takes a second, which one process alone need not wait

        self.wait()
        part = self.folder / f".step-{step:08d}.part"
        self.world.on_main(lambda: _make_anew(part))
        writing = dcp.async_save(
            tensors,
            storage_writer=dcp.FileSystemWriter(part, single_file_per_rank=True, sync_files=True),
            process_group=self.world.disk,
        )
        self.begin(lambda: self._finish(writing, part, step, state))

    def _finish(self, writing: Any, part: Path, step: int, state: dict[str, Any]) -> Path:
        writing.result()
        mine = {p.name: checkpoints._describe(p) for p in part.glob(f"__{self.world.rank}_*")}
        files: list[Any] | None = [None] * self.world.size if self.world.main else None
        dist.gather_object(mine, files, dst=0, group=self.world.disk)
        if files is not None:
            self._publish(part, step, state, {k: v for found in files for k, v in found.items()})
        dist.barrier(group=self.world.disk)
        return self.folder / f"step-{step:08d}"

    def _publish(self, part: Path, step: int, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        (part / STATE).write_text(json.dumps({"step": step, **state}))
        for name in (METADATA, STATE):
            manifest[name] = checkpoints._describe(part / name)
        (part / MANIFEST).write_text(json.dumps(manifest))
        for name in (METADATA, STATE, MANIFEST):
            checkpoints._flush(part / name)
        final = self.folder / f"step-{step:08d}"
        if final.exists():  # a damaged one of the same step, from before
            shutil.rmtree(final)
        os.replace(part, final)
        checkpoints._flush(self.folder)
        checkpoints.point_to(self.folder, final.name)
        for old in checkpoints._all(self.folder)[: -self.keep]:
            shutil.rmtree(old)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def find_newest(folder: Path, world: World) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest whole checkpoint, its state, and one line on each damaged one that was passed over; None without any.

    It may have been written by any number of processes. The ranks share the reading of the checksums.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    faults: list[str] = []
    candidates = world.on_main(lambda: checkpoints._all(folder))[::-1]
    for path in candidates:
        fault = next((f for f in world.gather(_fault_in(path, world)) if f), None)
        if fault is None:
            return path, json.loads((path / STATE).read_text()), faults
        faults.append(fault)
    if candidates:
        raise CheckpointError("; ".join(faults) + "; no whole checkpoint is left: start again with --fresh")
    return None


def _fault_in(path: Path, world: World) -> str | None:
    try:
        checkpoints.check(path, share=(world.rank, world.size))
    except CheckpointError as error:
        return str(error)
    return None


def read(path: Path, world: World, layout: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of the checkpoint ``path``, whole or as shards.

    Args:
        path: of one or of many processes.
        layout: (name, empty tensor of the whole shape on the meta device) -> the tensor to fill: whole, or a DTensor
            whose shard this rank holds.
    """
    if (path / TENSORS).exists():
        return load_file(path / TENSORS)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    target = {
        name: layout(name, torch.empty(entry.size, dtype=entry.properties.dtype, device="meta"))
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be in one process
        dcp.load(target, checkpoint_id=path, process_group=world.host, no_dist=not world.sharded)
    return target
