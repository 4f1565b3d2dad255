"""Several processes under torchrun with gloo, beside one process alone: the same losses, checkpoints for any number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llava_fast as lf
from llava_fast.data.dealing import deal, deal_step
from llava_fast.data.loader import plan_run
from llava_fast.errors import CheckpointError
from llava_fast.train import __main__ as command_line
from llava_fast.train.checkpoints import MANIFEST
from llava_fast.train.demo import PARTS
from tests.train.conftest import losses
from tests.train.ranks import make_trainer, mixed

ROOT = Path(__file__).parents[2]


def torchrun(ranks: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def run_ranks(ranks: int, folder: Path, *runs: dict, options: tuple[str, ...] = ()) -> str:
    """The runs one after the other on ``ranks`` processes; what they said."""
    command = [*torchrun(ranks, *options), "-m", "tests.train.ranks", str(folder), *map(json.dumps, runs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), cwd=ROOT, **pipes) as process:
        try:
            out, err = process.communicate(timeout=400)
        finally:
            process.terminate()  # torchrun then ends its ranks; killed, it would leave them waiting for each other
    assert process.returncode == 0, err[-4000:]
    return out + err


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Both stages in one process, which is the reference: losses, held-out losses and what was written, by stage."""
    folder = tmp_path_factory.mktemp("alone")
    for stage in (1, 2):
        make_trainer(folder, None, out=f"stage{stage}", stage=stage).run()
    return folder


def assert_same_run(run: Path, reference: Path) -> None:
    found, expected = losses(run), losses(reference)
    assert len(found) == len(expected) >= 20
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # AdamW takes the same step on gradients twice as large, so the losses alone would not tell them apart
    np.testing.assert_allclose(losses(run, "grad_norm"), losses(reference, "grad_norm"), rtol=1e-3)
    told, wanted = (json.loads((f / "summary.json").read_text()) for f in (run, reference))
    assert told["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5)
    assert told["tokens"] == wanted["tokens"]
    if told["stage"] == 1:
        ours, theirs = (load_file(f / "projector.safetensors") for f in (run, reference))
    else:
        ours, theirs = (dict(lf.load(f / "model")[0].named_parameters()) for f in (run, reference))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_two_processes_learn_what_one_does(alone, tmp_path):
    """From the start; and from where one process has stopped."""
    stopped = shutil.copytree(alone / "stage2", tmp_path / "going-on", symlinks=True)
    older, newest = sorted(stopped.glob("checkpoints/step-*"))
    shutil.rmtree(newest)
    runs = [{"out": "stage1", "stage": 1}, {"out": "stage2", "stage": 2}, {"out": "going-on", "stage": 2}]
    said = run_ranks(2, tmp_path, *runs)
    assert said.count("2 processes (mesh 2)") == 3  # rank 0 alone tells
    assert f"going on from {older}" in said
    assert_same_run(tmp_path / "stage1", alone / "stage1")
    assert_same_run(tmp_path / "stage2", alone / "stage2")
    assert_same_run(tmp_path / "going-on", alone / "stage2")
    written = max(tmp_path.glob("stage2/checkpoints/step-*"))
    files = {path.name for path in written.iterdir()} - {MANIFEST}
    assert len([name for name in files if name.endswith(".distcp")]) == 2
    assert json.loads((written / MANIFEST).read_text()).keys() == files  # of both, not of rank 0 alone


def test_cached_features_an_optimizer_on_the_host_and_adapters_on_two_processes(alone, tmp_path, capsys):
    lora = {"stage": 2, "epochs": 1, "lora_rank": 4, "lora_dropout": 0.0, "lr": 1e-2, "projector_lr": 1e-3}
    cached = {"stage": 1, "feature_cache": str(tmp_path / "cache"), "feature_cache_dtype": "float32"}
    said = run_ranks(
        2,
        tmp_path,
        {"out": "cached", **cached},
        {"out": "offload", "stage": 2, "optimizer": "adamw-offload"},
        {"out": "lora", **lora},
    )
    assert said.count("feature cache: ") == 1  # made by one of them
    assert_same_run(tmp_path / "cached", alone / "stage1")
    assert_same_run(tmp_path / "offload", alone / "stage2")

    make_trainer(tmp_path, None, out="lora-alone", **lora).run()
    expected = losses(tmp_path / "lora-alone")
    assert len(expected) >= 10 and expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(losses(tmp_path / "lora"), expected, rtol=0, atol=1e-5)
    ours, theirs = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("lora", "lora-alone"))
    assert sum("lora_A" in name for name in ours) == 7 * 2  # LLaMA's projections, two layers
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-4, msg=name)

    shutil.rmtree(sorted((tmp_path / "lora/checkpoints").glob("step-*"))[-1])
    make_trainer(tmp_path, None, out="lora", **lora).run()  # one process takes up what two have written
    assert "going on from" in capsys.readouterr().out
    np.testing.assert_allclose(losses(tmp_path / "lora"), expected, rtol=0, atol=1e-5)


def test_four_processes_and_hybrid_shards_learn_what_one_does(alone, tmp_path):
    """Bins of 160 tokens take several passes a step on each rank, and some have nothing in a pass, because pictures
    cannot be read; a frozen decoder is shared out too."""
    small = {"max_tokens": 160, "on_bad_sample": "skip", "broken": True}
    run_ranks(
        4,
        tmp_path,
        {"out": "frozen", "stage": 1, "shard_frozen": True, "activation_checkpointing": "full"},
        {"out": "hybrid", "stage": 2, "shard_size": 2, "activation_checkpointing": "selective"},
        {"out": "small", "stage": 2, **small},
    )
    assert_same_run(tmp_path / "frozen", alone / "stage1")
    assert_same_run(tmp_path / "hybrid", alone / "stage2")
    make_trainer(tmp_path, None, out="small-alone", stage=2, **small).run()
    assert_same_run(tmp_path / "small", tmp_path / "small-alone")
    skipped = [
        json.loads((tmp_path / run / "summary.json").read_text())["samples_skipped"] for run in ("small", "small-alone")
    ]
    assert skipped[0] == skipped[1] > 10


def test_a_killed_rank_is_started_again_and_the_run_goes_on(alone, tmp_path):
    run_ranks(2, tmp_path, {"out": "run", "stage": 2, "die_at": [1, 12]}, options=("--max-restarts=1",))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, len(losses(alone / "stage2")) + 1))
    assert_same_run(tmp_path / "run", alone / "stage2")


def test_stopped_on_two_damaged_resumed_on_four_and_on_one(tmp_path, capsys):
    """SIGTERM to torchrun; then a truncated shard; then other numbers of processes; all on the same curve."""
    data, out = tmp_path / "data.json", tmp_path / "run"
    data.write_text(json.dumps([s for s in mixed(120) if "image" not in s]))
    arguments = [
        *("--stage", "2", "--preset", "tiny", "--tokenizer", str(PARTS / "decoder"), "--data", str(data)),
        *("--batch-size", "4", "--epochs", "2", "--lr", "1e-3", "--log-every", "1", "--save-every", "4"),
        *("--template", "v1", "--workers", "0", "--device", "cpu", "--keep", "3"),
    ]
    here = ["-m", "llava_fast.train", *arguments, "--out", str(out)]

    def start_and_stop(ranks: int, at_step: int) -> str:
        log = tmp_path / f"{ranks}.log"
        with log.open("w") as file:
            process = subprocess.Popen([*torchrun(ranks), *here], env=environment(), cwd=ROOT, stdout=file, stderr=file)
            deadline = time.monotonic() + 200
            while steps_logged(out) < at_step:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) != 0
        return log.read_text()

    said = start_and_stop(2, at_step=9)
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    assert f"stopped at step {int(newest.name[5:])} of" in said
    assert said.count("start the same command again") == 1
    assert int(newest.name[5:]) == steps_logged(out)
    shard = next(newest.glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])

    said = start_and_stop(4, at_step=14)
    assert f"{newest}: {shard.name} is truncated" in said
    assert "going on from" in said
    assert not list((out / "checkpoints").glob(".*.part"))

    assert command_line.main(here[2:]) == 0  # one process takes up what four have written
    assert "going on from" in capsys.readouterr().out
    assert command_line.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert len(losses(out)) >= 20
    np.testing.assert_allclose(losses(out), losses(tmp_path / "whole"), rtol=0, atol=1e-5)

    for file in (out / "checkpoints").glob("step-*/manifest.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json.*--fresh"):
        make_trainer(tmp_path, None, out="run").resume()


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


# ---- shares of the work: no processes needed


def lengths_of_a_mixture(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens like LLaVA-1.5's second stage: captions and short answers around 650, some long text alone."""
    random = np.random.default_rng(0)
    tokens = np.where(
        random.random(count) < 0.8, 576 + random.integers(40, 500, count), random.integers(60, 2048, count)
    )
    return tokens, tokens * (1.0 + tokens / 40_000)  # attention's squares on top


@pytest.mark.parametrize("ranks", [2, 8])
def test_shares_are_even_and_every_sample_is_read_once(ranks):
    tokens, costs = lengths_of_a_mixture(3000)
    plan = plan_run(tokens, batch_size=128, max_tokens=8192, epochs=2, seed=0)
    shares = [deal(plan, tokens, costs, rank=r, ranks=ranks, max_tokens=8192) for r in range(ranks)]
    assert shares[0].fill >= 0.97
    assert shares[0].spread <= 1.02
    for i, step in enumerate(plan.steps):
        bins = [s.plan.steps[i] for s in shares]
        assert len({len(b) for b in bins}) == 1  # as many passes on every rank
        assert all(tokens[indices].sum() <= 8192 for b in bins for _, indices in b)
        read = np.concatenate([indices for b in bins for _, indices in b])
        assert sorted(read) == sorted(np.concatenate([indices for _, indices in step]))
        assert {epoch for b in bins for epoch, _ in b} == {step[0][0]}


def test_work_is_shared_by_cost_and_not_by_tokens():
    tokens = np.array([100] * 8)
    costs = np.array([8.0, 1, 1, 1, 1, 1, 1, 2])
    (bins,) = deal_step(np.arange(8), tokens, costs, ranks=2, max_tokens=800)
    assert sorted(costs[b].sum() for b in bins) == [8, 8]
    passes = deal_step(np.arange(8), tokens, costs, ranks=2, max_tokens=300)  # no room for seven in a bin
    assert len(passes) == 2
    done = [sum(costs[bins[rank]].sum() for bins in passes) for rank in range(2)]
    assert done == [8 + 2, 3 + 3]  # who had the dearer in the first pass has the cheaper in the second
    assert all(tokens[b].sum() <= 300 for bins in passes for b in bins)


def test_fewer_samples_than_ranks_leaves_empty_bins():
    passes = deal_step(np.array([0]), np.array([50]), np.array([1.0]), ranks=3, max_tokens=100)
    assert [sorted(len(b) for b in bins) for bins in passes] == [[0, 0, 1]]
