"""The command line killed at any moment and started again: the loss curve of an unbroken run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_fast.train import checkpoints
from llava_fast.train.__main__ import main
from llava_fast.train.demo import PARTS
from tests.train.conftest import losses


def options(data: Path, out: Path, stage: int) -> list[str]:
    return [
        *("--stage", str(stage), "--preset", "tiny"),
        *("--tokenizer", str(PARTS / "decoder"), "--data", str(data / "scenes.json"), "--images", str(data)),
        *("--out", str(out), "--batch-size", "6", "--epochs", "2", "--log-every", "1", "--save-every", "3"),
        *("--template", "v1", "--workers", "1", "--device", "cpu"),
    ]


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def start_and_stop(arguments: list[str], out: Path, at_step: int, number: signal.Signals) -> int:
    """Start the run in a process group of its own and send ``number`` once ``at_step`` is logged; its exit code."""
    command = [sys.executable, "-m", "llava_fast.train", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while steps_logged(out) < at_step:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, number)  # its data workers too, as a terminal, a batch system or a dying machine would
    return process.wait(timeout=120)


@pytest.mark.parametrize("stage", [1, 2])
def test_kill_at_a_random_step(scenes_folder, tmp_path, stage, capsys):
    seed = random.randrange(1000)
    shown = f"seed {seed}"
    at = random.Random(seed).sample(range(1, 18), stage)  # a run that was resumed is killed too, in stage 2
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(options(scenes_folder, whole, stage)) == 0
    arguments = options(scenes_folder, broken, stage)
    for step in sorted(at):
        start_and_stop(arguments, broken, step, signal.SIGKILL)
    newest = sorted((broken / "checkpoints").glob("step-*"))
    if newest:  # the machine died in the middle of a write, too
        tensors = newest[-1] / checkpoints.TENSORS
        tensors.write_bytes(tensors.read_bytes()[:-100])
    if len(newest) == 1:  # nothing whole is left: say so, name it, and go on once told to start over
        assert main(arguments) == 1, shown
        assert "is truncated" in capsys.readouterr().err, shown
        assert main([*arguments, "--fresh"]) == 0, shown
    else:  # two, or none where the kills came before the first was whole
        assert main(arguments) == 0, shown
        told = capsys.readouterr().out
        assert not newest or f"{newest[-1]}: {checkpoints.TENSORS} is truncated" in told, shown
        assert ("is truncated" in told) == bool(newest), shown
    assert len(losses(whole)) == len(losses(broken)) >= 20, shown
    assert losses(broken) == losses(whole), shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_leaves_cleanly(scenes_folder, tmp_path, number):
    out = tmp_path / "run"
    assert start_and_stop(options(scenes_folder, out, 1), out, 4, number) == 130
    step = checkpoints.load_newest(out / "checkpoints")[1]["step"]
    assert step == steps_logged(out) >= 4
    assert not list((out / "checkpoints").glob(".*.part"))
