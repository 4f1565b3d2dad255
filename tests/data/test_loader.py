"""Plans and loading: every sample once an epoch, steps as a recipe means them, the same batches from any start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import llava_fast as lf
from llava_fast.data import loader
from llava_fast.data.loader import EncodeOptions, fingerprint, load_steps, measure, plan_run
from llava_fast.data.scenes import Scenes
from llava_fast.errors import LlavaError
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import PARTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_processor():
    return Processor.from_config(lf.ModelConfig.preset("tiny"), Tokenizer.load(PARTS / "decoder"))


def lengths_like_lcs(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(55, 85, count) + 576


@pytest.mark.parametrize("batch_size", [8, 128])
def test_every_sample_once_an_epoch_in_as_many_steps_as_batches(batch_size):
    lengths = np.random.default_rng(0).integers(100, 1500, 2000)
    lengths[[5, 9]] = 0  # cannot be used
    plan = plan_run(lengths, batch_size=batch_size, max_tokens=8192, epochs=2, seed=1)
    per_epoch = round(1998 / batch_size)
    assert len(plan.steps) == pytest.approx(2 * per_epoch, abs=2)
    for epoch in range(2):
        taken = np.concatenate([b for step in plan.steps for e, b in step if e == epoch])
        assert sorted(taken) == sorted(set(range(2000)) - {5, 9})
    assert all(lengths[b].sum() <= plan.bin_tokens <= 8192 for step in plan.steps for _, b in step)
    counts = [sum(len(b) for _, b in step) for step in plan.steps]
    assert np.mean(counts) == pytest.approx(batch_size, rel=0.05)


def test_fill_where_equal_lengths_leave_a_gap():
    """LCS-558K with 576 image rows does not fill bins of 8192; a slightly smaller bin is chosen that it fills."""
    plan = plan_run(lengths_like_lcs(5000), batch_size=256, max_tokens=8192, epochs=1, seed=0)
    assert plan.fill >= 0.97


def test_plans_are_seeded_and_epochs_differ():
    def plan(seed):
        steps = plan_run(lengths_like_lcs(300), batch_size=16, max_tokens=8192, epochs=2, seed=seed).steps
        return [(e, tuple(b)) for step in steps for e, b in step]

    assert plan(1) == plan(1) != plan(2)
    first, second = ({b for e, b in plan(1) if e == epoch} for epoch in (0, 1))
    assert not first & second


def test_nothing_usable():
    with pytest.raises(LlavaError, match="no usable sample"):
        plan_run(np.zeros(3, dtype=np.int64), batch_size=8, max_tokens=100, epochs=1, seed=0)


def test_measured_lengths_are_those_of_the_batches(processor):
    samples, options = Scenes(12, 3), EncodeOptions()
    lengths, bad = measure(samples, processor, options)
    assert bad == []
    assert lengths.tolist() == list(processor.pack([samples[i] for i in range(12)]).seqlens)
    assert fingerprint(lengths) != fingerprint(lengths[:-1])


def test_random_placement_is_measured_within_a_few_tokens(processor):
    samples, options = Scenes(12, 3), EncodeOptions(image_position="random", seed=4)
    lengths, _ = measure(samples, processor, options)
    actual = processor.pack([samples[i] for i in range(12)], image_position="random", seed=4).seqlens
    assert np.abs(lengths - actual).max() <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_from_any_start(processor, workers):
    samples, options = Scenes(40, 3), EncodeOptions(image_position="random")
    lengths, _ = measure(samples, processor, options)
    plan = plan_run(lengths, batch_size=8, max_tokens=600, epochs=2, seed=0)

    def batches(**where):
        return [b for step, _ in load_steps(samples, processor, plan, options, **where) for b in step]

    whole, rest = batches(), batches(start=4, workers=workers)
    skipped = sum(len(step) for step in plan.steps[:4])
    assert len(rest) == len(whole) - skipped > 0
    for a, b in zip(whole[skipped:], rest, strict=True):
        assert a.sample_ids == b.sample_ids
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.pixel_values, b.pixel_values)
    first = [b for b in whole if "scene-3-0-conversation" in b.sample_ids]
    assert len(first) == 2  # once an epoch


def test_a_broken_image_costs_its_sample_and_not_its_bin(processor, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    samples = [Scenes(4, 3)[i] for i in range(4)]
    samples[2]["image"] = str(tmp_path / "broken.jpg")
    lengths, _ = measure(samples, processor, EncodeOptions())
    plan = plan_run(lengths, batch_size=4, max_tokens=8192, epochs=1, seed=0)
    ((batches, bad),) = load_steps(samples, processor, plan, EncodeOptions())
    assert len(batches[0].sample_ids) == 3
    assert [(sample_id, "broken.jpg" in why) for sample_id, why in bad] == [(samples[2]["id"], True)]


FAILING = """
import sys
import numpy as np
from llava_fast.data.loader import EncodeOptions, load_steps, plan_run
from llava_fast.data.scenes import Scenes
from tests.data.test_loader import make_processor
scenes = Scenes(40, 0)
plan = plan_run(np.full(40, 100), batch_size=4, max_tokens=512, epochs=1, seed=0)
for batches, bad in load_steps(scenes, make_processor(), plan, EncodeOptions(), workers=2):
    raise RuntimeError("a step failed")
"""


def test_an_error_that_nobody_catches_ends_the_workers_too():
    """Uncaught, it keeps the loader alive, and its workers ignore the SIGTERM that multiprocessing sends them."""
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: a step failed")


class Slow:
    """Samples of which every fifth takes long, and a record of which process made which."""

    def __init__(self, folder):
        self.scenes, self.folder = Scenes(40, 0), folder

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        if index % 5 == 0:
            time.sleep(0.02)
        (self.folder / f"{index}-{os.getpid()}").touch()
        return self.scenes[index]


def test_workers_read_ahead_and_the_order_is_the_plan_s(processor, tmp_path):
    """Later steps are made, in other processes, while the first is used; they come in the plan's order all the same."""
    scenes, options = Scenes(40, 0), EncodeOptions()
    lengths, _ = measure(scenes, processor, options)
    plan = plan_run(lengths, batch_size=4, max_tokens=512, epochs=1, seed=0)
    stream = load_steps(Slow(tmp_path), processor, plan, options, workers=2)
    got = [next(stream)]
    first = {int(i) for _, indices in plan.steps[0] for i in indices}
    for _ in range(500):  # nobody asks for more; it is made ahead
        made = [tuple(map(int, p.name.split("-"))) for p in tmp_path.iterdir()]
        if len({i for i, _ in made} - first) >= 8 and len({pid for _, pid in made}) == 2:
            break
        time.sleep(0.02)
    else:
        raise AssertionError(f"nothing was read ahead: {made}")
    assert os.getpid() not in {pid for _, pid in made}
    got += stream
    ids = [[i for batch in batches for i in batch.sample_ids] for batches, _ in got]
    assert ids == [[scenes[int(i)]["id"] for _, b in bins for i in b] for bins in plan.steps]


def test_batches_are_pinned_and_copied_without_waiting(processor, monkeypatch):
    """What a GPU gets: every tensor from page-locked memory, every copy non-blocking. The calls are watched."""
    batch = processor.pack([Scenes(4, 0)[0]])
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    pinned, copied = [], []
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
        patch.setattr(torch.Tensor, "to", lambda self, *a, **kw: copied.append(kw) or self)
        batch.pin_memory().to("cuda", torch.bfloat16)
    assert len(pinned) == len(copied) == len(tensors) == 8
    assert all(kw == {"non_blocking": True} for kw in copied)
    asked = []

    class Loader:
        def __init__(self, dataset, **kw):
            asked.append(kw)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(loader, "DataLoader", Loader)
    plan = loader.Plan([], 512, 1.0)
    list(load_steps(Scenes(4, 0), processor, plan, EncodeOptions(), workers=3, pin_memory=True))
    assert asked[0]["pin_memory"] is True and asked[0]["num_workers"] == 3 and asked[0]["prefetch_factor"] >= 2
