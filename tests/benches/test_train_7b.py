"""benches/train_7b.py: the whole script at tiny size, and what it chooses for cards that are not at hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import llava_fast as lf
from benches import train_7b
from benches.lengths import of_stage, sizes
from benches.training import make_samples, packed, padded, to_longest, with_image_token
from llava_fast.train.recipe import Recipe

TINY = ["--size", "tiny", "--seconds", "0", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Few samples to measure and few pictures to make."""
    monkeypatch.setattr(train_7b, "MOST_STEPS", 6)
    monkeypatch.setattr(train_7b, "PICTURES", 2)


def test_end_to_end_at_tiny_size(tmp_path, capsys):
    assert train_7b.main([*TINY, "--loss-steps", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "train_7b.json").read_text())
    assert set(train_7b.PARTS) < set(found)
    for stage in (1, 2):
        ours, theirs = found[f"stage{stage}"], found[f"transformers_stage{stage}"]
        for one in (ours, theirs):
            assert one["tokens_per_s"] > one["supervised_tokens_per_s"] > one["samples_per_s"] > 0
            assert 5.5 < one["last_loss"] < 7.5  # ln 640 = 6.46: random weights
        assert 0.5 < theirs["batch_fill"] <= 1
        ratio = ours["supervised_tokens_per_s"] / theirs["supervised_tokens_per_s"]
        assert found["ratios"][f"stage{stage}_over_transformers"] == ratio
    if "fp8_frozen" not in Recipe.__dataclass_fields__:
        assert found["losses"] == found["stage1_fp8"] == {"skipped": "this version has no --fp8-frozen"}
    else:
        assert len(found["losses"]["losses_fp8"]) == 2


def test_a_part_that_fails_hides_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_7b, "ours", lambda setting, stage: 1 / 0)
    assert train_7b.main([*TINY, "--parts", "stage1,transformers_stage1", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "train_7b.json").read_text())
    assert found["stage1"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["transformers_stage1"]["tokens_per_s"] > 0


def test_stopped_half_way_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    def stop(setting, stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_7b, "theirs", stop)
    monkeypatch.setattr(train_7b, "ours", lambda setting, stage: {"tokens_per_s": 5.0})
    assert train_7b.main(["--size", "tiny", "--parts", "stage1,transformers_stage1", "--out", str(tmp_path)]) == 130
    assert json.loads((tmp_path / "train_7b.json").read_text())["stage1"] == {"tokens_per_s": 5.0}
    assert "stopped in transformers_stage1" in capsys.readouterr().err


def test_what_fits_which_card():
    """18 bytes a parameter, 122 GB of the 7B model, before any activation."""
    config = with_image_token(lf.ModelConfig.preset("llava-1.5-7b"))

    def first(stage, gigabytes):
        return next(train_7b.rungs(config, stage, torch.bfloat16, gigabytes * 1e9, 1403), None)

    assert first(2, 149.7) == {"max_tokens": 4096, "activation_checkpointing": "selective"}
    assert first(2, 1e6) == {"max_tokens": 8192, "activation_checkpointing": "none"}


def test_random_text_is_of_the_lengths_it_was_asked_for():
    config = with_image_token(lf.ModelConfig.preset("tiny"))
    rows = of_stage(2, 20)
    samples = make_samples(config, rows)
    batch, table = packed(config, samples), sizes(rows, config.tokens_per_image)
    assert list(batch.seqlens) == table[:, 0].tolist()
    assert (batch.num_supervised, batch.num_images) == (table[:, 1].sum(), table[:, 2].sum())
    assert len(batch.image_rows) == batch.num_images * config.tokens_per_image
    longest = to_longest(samples)
    assert {len(s.ids) for s in longest} == {table[:, 0].max()} == {padded(samples)["input_ids"].shape[1]}
    assert packed(config, longest).num_supervised == batch.num_supervised


def test_lengths_of_a_stage_come_once_before_they_come_twice():
    rows = of_stage(1, 700)
    assert sorted(rows[:317]) == sorted(rows[317:634])
    assert rows[:317] != rows[317:634]
    pictures = np.array(of_stage(2, 1842))[:, 2]
    assert 0.45 < pictures.mean() < 0.6
