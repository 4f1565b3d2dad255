"""LoRA in the training loop: what is trained and kept, resumption, what is written, and the command line around it."""

from __future__ import annotations

import json

import pytest
import torch

import llava_fast as lf
from llava_fast.data.scenes import Scenes
from llava_fast.errors import ConfigError
from llava_fast.interrupt import Interrupted
from llava_fast.model.lora import attach, merge
from llava_fast.train import checkpoints
from llava_fast.train.__main__ import main
from llava_fast.train.merge import main as merge_main
from llava_fast.train.recipe import recipe
from tests.train.conftest import losses

LORA = {"stage": 2, "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "lr": 1e-2, "projector_lr": 1e-3}


@pytest.fixture
def base(small, tmp_path):
    """The small model on disk: what adapters stand on."""
    lf.save(*small, tmp_path / "base")
    return tmp_path / "base"


def adapted(trainer, base, **changes):
    """A run with fresh adapters on weights as they are in ``base``."""
    run = trainer(**{**LORA, **changes})
    run.model, run.processor = lf.load(base)
    attach(run.model, run.recipe.lora(base=str(base)), seed=run.recipe.seed)
    return run


def test_adapters_and_projector_alone_are_trained_and_kept(trainer, base):
    run = adapted(trainer, base)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    summary = run.run()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    expected = {n for n in before if ".lora_" in n or n.startswith("projector.")}
    assert changed == expected
    assert len(expected) == 2 * 4 * 2 + 2  # A and B of four products in two layers; weight and bias
    assert set(run.optimizer.masters) == expected
    assert all(p.grad is None for n, p in run.model.named_parameters() if n not in expected)
    rates = {g["peak"]: len(g["params"]) for g in run.optimizer.adam.param_groups}
    assert rates == {1e-2: 16, 1e-3: 2}
    tensors, _, _ = checkpoints.load_newest(run.out / "checkpoints")
    assert {name.split(".", 1)[1] for name in tensors} == expected
    assert summary["final_loss"] < summary["first_loss"]
    assert summary["result"].endswith("adapter")
    reloaded, _ = lf.load(run.out / "adapter", merge_adapter=False)
    for (name, a), b in zip(reloaded.named_parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_result_answers_as_the_trained_model_did(trainer, base, tmp_path):
    run = adapted(trainer, base)
    run.run()
    batch = run.processor.pack(list(Scenes(4, 9)))
    with torch.no_grad():
        expected = run.model.logits(batch)
        merged, processor = lf.load(run.out / "adapter")
        torch.testing.assert_close(merged.logits(batch), expected, atol=1e-4, rtol=0)
        assert merge_main([str(run.out / "adapter"), "--out", str(tmp_path / "whole")]) == 0
        whole, _ = lf.load(tmp_path / "whole")
        torch.testing.assert_close(whole.logits(batch), expected, atol=1e-4, rtol=0)
    assert processor.template == run.processor.template
    assert merged.config == whole.config


def test_interrupted_and_resumed_with_the_same_losses(trainer, base):
    unbroken = adapted(trainer, base, out="unbroken", epochs=2)
    unbroken.run()
    run = adapted(trainer, base, epochs=2, save_every=50)
    honest = run.train_step

    def ask_at_3(batches, total):
        if run.step == 2:
            run.stop_asked.set()
        return honest(batches, total)

    run.train_step = ask_at_3
    with pytest.raises(Interrupted):
        run.run()
    again = adapted(trainer, base, epochs=2, save_every=50)
    again.run()
    assert losses(again.out) == losses(unbroken.out)  # dropout included: its random state is in the checkpoint


def test_bfloat16_adapters_have_float32_masters(trainer, base):
    run = adapted(trainer, base)
    run.model, _ = lf.load(base, dtype=torch.bfloat16)
    attach(run.model, run.recipe.lora(base=str(base)))
    run.run()
    tensors, _, _ = checkpoints.load_newest(run.out / "checkpoints")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_activation_checkpointing_repeats_the_dropout(trainer, base):
    plain = adapted(trainer, base, out="plain")
    plain.run()
    again = adapted(trainer, base, out="again")
    again.recipe = recipe("paper-stage2", **{**vars(again.recipe), "activation_checkpointing": True})
    again.run()
    assert losses(again.out) == pytest.approx(losses(plain.out), rel=1e-5)


def test_recipe_of_llava_1_5():
    """finetune_lora.sh: rank 128, alpha 256, adapters at 2e-4 and the projector at 2e-5, 128 samples, one epoch."""
    chosen = recipe("llava-1.5-lora")
    assert (chosen.lora_rank, chosen.lora_alpha, chosen.lora_dropout) == (128, 256.0, 0.05)
    assert (chosen.lr, chosen.projector_lr, chosen.batch_size, chosen.epochs) == (2e-4, 2e-5, 128, 1)
    assert (chosen.warmup_ratio, chosen.weight_decay, chosen.max_length, chosen.template) == (0.03, 0.0, 2048, "v1")
    assert chosen.lora().targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_command_line_from_base_to_merged_model(base, scenes_folder, tmp_path, capsys):
    common = ["--data", str(scenes_folder / "scenes.json"), "--images", str(scenes_folder), "--workers", "0"]
    out = tmp_path / "run"
    options = ["--recipe", "llava-1.5-lora", "--lora-rank", "4", "--lora-alpha", "8", "--batch-size", "32"]
    command = ["--model", str(base), *common, *options, "--out", str(out)]
    assert main(command) == 0
    assert "LoRA adapters of the decoder" in capsys.readouterr().out
    fields = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (4, 8.0, str(base.resolve()))
    assert main([*command, "--lora-alpha", "9"]) == 1
    assert "recipe.lora_alpha: 8.0 then, 9.0 now" in capsys.readouterr().err
    assert main([*command, "--fresh"]) == 0
    assert merge_main([str(out / "adapter"), "--out", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    assert lf.load(tmp_path / "merged")[0].dtype == torch.bfloat16
    # New adapters cannot stand on an adapter.
    assert main(["--model", str(out / "adapter"), *common, *options, "--out", str(tmp_path / "b")]) == 1
    assert "merge it first" in capsys.readouterr().err


def test_joined_parts_give_the_authors_layout(scenes_folder, tmp_path):
    from llava_fast.train.demo import PARTS

    command = ["--vision-tower", str(PARTS / "vision"), "--decoder", str(PARTS / "decoder"), "--workers", "0"]
    command += ["--data", str(scenes_folder / "scenes.json"), "--images", str(scenes_folder), "--batch-size", "32"]
    assert main([*command, "--recipe", "llava-1.5-lora", "--lora-rank", "2", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "adapter" / "non_lora_trainables.bin").is_file()
    merged, processor = lf.load(tmp_path / "run" / "adapter")
    batch = processor.pack(list(Scenes(2, 9)))
    kept, _ = lf.load(tmp_path / "run" / "adapter", merge_adapter=False)
    with torch.no_grad():
        torch.testing.assert_close(merged.logits(batch), kept.logits(batch), atol=1e-4, rtol=0)
    merge(kept)
    for (name, a), b in zip(kept.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)


WRONG = {
    "stage-1": (["--stage", "1", "--lora-rank", "4"], "which stage 1 leaves alone"),
    "four-bits-on-a-cpu": (["--stage", "2", "--lora-rank", "4", "--lora-bits", "4"], "(QLoRA) needs a CUDA device"),
    "bits-alone": (["--stage", "2", "--lora-bits", "4"], "it needs --lora-rank"),
    "eight-bits": (["--stage", "2", "--lora-rank", "4", "--lora-bits", "8"], "4 is the one choice"),
    "targets": (["--stage", "2", "--lora-rank", "4", "--lora-targets", "q_proj,fc1"], "choose some of q_proj"),
    "negative": (["--stage", "2", "--lora-rank", "-1"], "lora_rank=-1"),
}


@pytest.mark.parametrize("options, says", WRONG.values(), ids=WRONG)
def test_mistakes(options, says, base, scenes_folder, tmp_path, capsys):
    data = ["--data", str(scenes_folder / "scenes.json"), "--images", str(scenes_folder), "--device", "cpu"]
    assert main(["--model", str(base), *data, *options, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip()
    assert says in said
    assert "\n" not in said  # one line
    assert not (tmp_path / "run").exists()  # before any work


def test_random_weights_and_merging_what_is_no_adapter(base, scenes_folder, tmp_path, capsys):
    from llava_fast.train.demo import PARTS

    preset = ["--preset", "tiny", "--tokenizer", str(PARTS / "decoder"), "--stage", "2", "--lora-rank", "2"]
    assert main([*preset, "--data", str(scenes_folder / "scenes.json"), "--out", str(tmp_path / "r")]) == 1
    assert "needs weights on disk" in capsys.readouterr().err
    assert merge_main([str(base), "--out", str(tmp_path / "m")]) == 1
    assert "holds no adapter_config.json" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="lora_rank=-2"):
        recipe("paper-stage2", lora_rank=-2)
