"""The training loop: what is trained, what it writes, and what it does when something is wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import llava_fast as lf
from llava_fast.data.scenes import Scenes
from llava_fast.errors import ConfigError, SampleError, TrainingError
from llava_fast.interrupt import Interrupted
from llava_fast.train import checkpoints
from llava_fast.train.trainer import held_out_loss
from tests.train.conftest import losses


def test_stage1_trains_the_projector_alone(trainer):
    run = trainer(stage=1, lr=1e-2)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    summary = run.run()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"projector.linear_1.weight", "projector.linear_1.bias"}
    assert summary["final_loss"] < summary["first_loss"]
    written = load_file(run.out / "projector.safetensors")
    assert set(written) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    assert torch.equal(written["model.mm_projector.weight"], run.model.projector.linear_1.weight)


def test_stage2_trains_projector_and_decoder(trainer):
    run = trainer(stage=2, lr=1e-3)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.run()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("vision_tower."), name
    assert (run.out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    reloaded, _ = lf.load(run.out / "model")
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), run.model.parameters(), strict=True))


def test_accumulation_is_the_mean_over_all_supervised_tokens(trainer):
    """All the data in one bin or in many: the same step, because each bin's sum is divided by the count over all."""
    one = trainer(stage=1, out="one", batch_size=32, save_every=99)
    one.run()
    expected = {n: p.detach().clone() for n, p in one.model.projector.named_parameters()}
    one.model.init_weights(1)
    many = trainer(stage=1, out="many", batch_size=32, max_tokens=300, save_every=99)
    many.run()
    assert [len(step) for step in one.plan.steps] == [1]
    assert len(many.plan.steps) == 1
    assert len(many.plan.steps[0]) > 5
    assert losses(many.out) == pytest.approx(losses(one.out), rel=1e-5)
    for name, parameter in many.model.projector.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5)


def test_bfloat16_has_float32_masters(small, trainer):
    small[0].to(torch.bfloat16)
    run = trainer(stage=2, lr=1e-3)
    run.run()
    state, _, _ = checkpoints.load_newest(run.out / "checkpoints")
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in losses(run.out))
    assert losses(run.out)[-1] < losses(run.out)[0]


def test_evaluation_during_the_run(trainer):
    held_out = Scenes(8, 6)
    run = trainer(stage=1, eval_samples=held_out, eval_every=2)
    summary = run.run()
    records = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4]
    batch = run.processor.pack(list(held_out))
    with torch.no_grad():
        expected = run.model.loss(batch).item()
    assert summary["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert held_out_loss(run.model, run.processor, run.recipe, held_out, 0) == pytest.approx(expected, rel=1e-5)


def test_text_only_and_image_samples_mixed(trainer):
    text = {"id": "t", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]}
    mixed = [s for i in range(8) for s in (Scenes(32, 5)[i], {**text, "id": f"t{i}"})]
    assert trainer(mixed, stage=2).run()["samples"] == 16
    only_text = [{**text, "id": f"t{i}"} for i in range(8)]
    assert trainer(only_text, out="text", stage=2).run()["final_loss"] > 0


def test_non_finite_loss_names_step_samples_and_checkpoint(trainer):
    run = trainer(stage=2, log_every=100, save_every=2)
    honest = run.train_step

    def poisoned(batches, total):
        if run.step == 3:
            run.model.projector.linear_1.bias.data.fill_(float("nan"))
        return honest(batches, total)

    run.train_step = poisoned
    with pytest.raises(TrainingError, match=r"step 4: loss is nan.*scene-5-.*checkpoints/step-00000002"):
        run.run()
    assert checkpoints.load_newest(run.out / "checkpoints")[1]["step"] == 2  # nothing bad was saved


def test_bad_samples_stop_or_are_skipped_and_counted(trainer, tmp_path, capsys):
    (tmp_path / "fake.png").write_text("not a picture")
    good = [Scenes(32, 5)[i] for i in range(10)]
    samples = [
        *good,
        {**good[0], "id": "fake", "image": str(tmp_path / "fake.png")},
        {"id": "empty", "conversations": []},
    ]
    with pytest.raises(SampleError, match=r"'empty'.*--on-bad-sample skip"):
        trainer(samples, stage=1).run()
    with pytest.raises(SampleError, match=r"'fake'.*fake\.png"):
        trainer(samples[:-1], out="other", stage=1).run()
    summary = trainer(samples, out="skip", stage=1, on_bad_sample="skip").run()
    assert summary["samples_skipped"] == 2
    assert "skipped sample 'fake'" in capsys.readouterr().out


def test_stop_request_saves_and_the_next_run_goes_on(trainer):
    unbroken = trainer(stage=1, out="unbroken", epochs=2)
    unbroken.run()
    unbroken.model.init_weights(1)
    run = trainer(stage=1, epochs=2, save_every=50)
    honest = run.train_step

    def ask_at_3(batches, total):
        if run.step == 2:
            run.stop_asked.set()
        return honest(batches, total)

    run.train_step = ask_at_3
    with pytest.raises(Interrupted, match=r"step 3 of 8; saved in .*step-00000003"):
        run.run()
    run.model.init_weights(1)
    summary = trainer(stage=1, epochs=2, save_every=50).run()
    assert losses(run.out) == losses(unbroken.out)
    assert summary["steps"] == 8


def test_finished_run_is_not_run_again(trainer):
    first = trainer(stage=1).run()
    again = trainer(stage=1).run()
    assert again["final_loss"] == first["final_loss"]
    assert again["steps"] == first["steps"]


def test_other_settings_or_data_in_the_same_folder_are_refused(trainer):
    trainer(stage=1).run()
    with pytest.raises(ConfigError, match=r"recipe.lr: 0.002 then, 0.5 now.*--fresh"):
        trainer(stage=1, lr=0.5).run()
    with pytest.raises(ConfigError, match=r"data: "):
        trainer(Scenes(32, 6), stage=1).run()


def test_a_sample_longer_than_a_bin_is_refused_before_work(trainer):
    with pytest.raises(lf.errors.LlavaError, match=r"longest sample has \d+ tokens and max_tokens is 60.*--max-tokens"):
        trainer(stage=1, max_tokens=60).run()
