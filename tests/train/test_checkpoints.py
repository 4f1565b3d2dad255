"""Run checkpoints: whole or not there, the newest whole one is taken, damage is named."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from llava_fast.errors import CheckpointError
from llava_fast.train import checkpoints


def write(folder, *steps, keep=10):
    return [checkpoints.save(folder, s, {"w": torch.full((50,), float(s))}, {"note": s}, keep) for s in steps]


def test_newest_is_taken_up_and_latest_points_to_it(tmp_path):
    write(tmp_path, 3, 12)
    tensors, state, faults = checkpoints.load_newest(tmp_path)
    assert (tensors["w"][0].item(), state["step"], state["note"], faults) == (12, 12, 12, [])
    assert os.readlink(tmp_path / "latest") == "step-00000012"


def test_last_k_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_nothing_there(tmp_path):
    assert checkpoints.load_newest(tmp_path / "none") is None


def test_unfinished_write_is_not_a_checkpoint(tmp_path):
    """What a kill in the middle of a save leaves behind is passed over, and the next save clears it."""
    write(tmp_path, 1)
    part = tmp_path / ".step-00000002.part"
    part.mkdir()
    (part / checkpoints.TENSORS).write_bytes(b"half")
    assert checkpoints.load_newest(tmp_path)[1]["step"] == 1
    write(tmp_path, 2)
    assert checkpoints.load_newest(tmp_path)[1]["step"] == 2
    assert not part.exists()


@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.STATE, checkpoints.MANIFEST])
def test_truncated_is_named_and_the_one_before_is_used(tmp_path, name):
    _, newest = write(tmp_path, 1, 2)
    file = newest / name
    file.write_bytes(file.read_bytes()[:-7])
    tensors, state, faults = checkpoints.load_newest(tmp_path)
    assert state["step"] == 1
    assert tensors["w"][0].item() == 1
    assert len(faults) == 1
    assert str(newest) in faults[0]
    assert name in faults[0]


def test_one_flipped_bit_is_found(tmp_path):
    _, newest = write(tmp_path, 1, 2)
    file = newest / checkpoints.TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert checkpoints.load_newest(tmp_path)[1]["step"] == 1
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is damaged"):
        checkpoints.check(newest)


def test_missing_file_is_named(tmp_path):
    (only,) = write(tmp_path, 1)
    (only / checkpoints.TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"lacks tensors.safetensors; no whole checkpoint is left.*--fresh"):
        checkpoints.load_newest(tmp_path)


def test_damaged_one_of_the_same_step_is_replaced(tmp_path):
    (only,) = write(tmp_path, 5)
    (only / checkpoints.STATE).write_text("{")
    write(tmp_path, 5)
    assert checkpoints.load_newest(tmp_path)[1]["note"] == 5


def test_random_state_round_trip():
    state = checkpoints.rng_state()
    first = torch.rand(3)
    checkpoints.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_the_caller_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """What it changes meanwhile is not in the checkpoint, which has its name only when it is whole."""
    flush, may_go_on = checkpoints._flush, threading.Event()
    monkeypatch.setattr(checkpoints, "_flush", lambda path: may_go_on.wait(60) and flush(path))
    writer = checkpoints.Writer(tmp_path, keep=2)
    w = torch.zeros(5)
    writer.save(1, {"w": w}, {})
    w += 1
    assert writer.published is None
    assert not list(tmp_path.glob("step-*"))
    may_go_on.set()
    writer.wait()
    tensors, state, _ = checkpoints.load_newest(tmp_path)
    assert (tensors["w"].tolist(), state["step"]) == ([0.0] * 5, 1)
    assert writer.published == tmp_path / "step-00000001"


def test_a_disk_that_is_full_is_told_at_the_next_save(tmp_path, monkeypatch):
    def full(*inputs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    writer = checkpoints.Writer(tmp_path, keep=2)
    writer.save(1, {"w": torch.zeros(5)}, {})
    with pytest.raises(CheckpointError, match=r"could not be written.*No space left on device.*disk full"):
        writer.save(2, {"w": torch.zeros(5)}, {})
