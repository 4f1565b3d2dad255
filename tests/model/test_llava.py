"""Construction, freezing, sampling and errors of the network."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import llava_fast as lf
from llava_fast.errors import ConfigError
from llava_fast.model.generation import choose


def test_weights_are_made_once_in_the_dtype_asked_for():
    """Peak memory of building a model is the model, not a float32 copy or a second set."""
    program = """
import resource, torch, llava_fast as lf
from dataclasses import replace
text = replace(lf.ModelConfig.preset("tiny").text, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
               num_attention_heads=8, num_key_value_heads=8, head_dim=128)
config = lf.ModelConfig.preset("tiny").replace(text=text)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = lf.Llava(config, dtype=torch.bfloat16)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.3


def test_same_seed_same_weights():
    config = lf.ModelConfig.preset("tiny")
    a, b, c = (lf.Llava(config, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["decoder.embed_tokens"], c["decoder.embed_tokens"])


def test_frozen_tower_builds_no_graph():
    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    model.requires_grad_(False)
    assert not model.image_features(torch.randn(2, 3, 48, 48)).requires_grad


def test_frozen_decoder_gets_no_gradient():
    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model.loss(tiny_batch()).backward()
    assert all((p.grad is not None) == name.startswith("projector.") for name, p in model.named_parameters())


def tiny_batch() -> lf.PackedBatch:
    ids = torch.tensor([1] + [4] * 9 + [7, 8, 9, 1, 10, 11, 12])
    labels = torch.where(ids.roll(-1) == 4, -100, ids.roll(-1))
    positions = torch.cat([torch.arange(13), torch.arange(4)]).int()
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return lf.PackedBatch(ids, labels, positions, torch.tensor([0, 13, 17]).int(), pixels, 4)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(kind):
    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    model.loss(tiny_batch()).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.decoder.checkpoint_activations = kind
    model.loss(tiny_batch()).backward()
    for name, parameter in model.named_parameters():
        if name in plain:
            assert torch.equal(parameter.grad, plain[name]), name


def test_packing_does_not_leak_between_sequences():
    """The second sequence's logits are the same alone and behind another one."""
    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    alone = lf.PackedBatch(
        torch.tensor([1, 10, 11, 12]),
        torch.full((4,), -100),
        torch.arange(4).int(),
        torch.tensor([0, 4]).int(),
        torch.zeros(0, 3, 48, 48),
        4,
    )
    torch.testing.assert_close(model.logits(tiny_batch())[13:], model.logits(alone), atol=1e-6, rtol=1e-5)


def test_batch_of_another_models_processor_is_refused():
    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    batch = tiny_batch()
    batch.pixel_values = torch.zeros(2, 3, 48, 48)
    with pytest.raises(ValueError, match="9 image rows but its 2 images give 18"):
        model.logits(batch)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"attention='flash9'.*choose auto"):
        lf.Llava(lf.ModelConfig.preset("tiny"), attention="flash9")
    with pytest.raises(ConfigError, match=r"preset='huge'.*llava-1.5-7b"):
        lf.ModelConfig.preset("huge")


def test_presets_have_the_published_sizes():
    """Parameter counts of reference checkpoints: LLaMA 6,738,415,616 and 13,015,864,320; CLIP-L; projectors."""
    expected = {
        "llava-v1-7b": (6_738_415_616, 303_179_776, 4_198_400),
        "llava-v1-13b": (13_015_864_320, 303_179_776, 5_248_000),
        "llava-1.5-7b": (6_738_415_616, 303_507_456, 20_979_712),
        "llava-1.5-13b": (13_015_864_320, 303_507_456, 31_467_520),
    }
    for name, (text, vision, projector) in expected.items():
        with torch.device("meta"):
            model = lf.Llava(lf.ModelConfig.preset(name), device="meta", seed=None)
        count = {
            part: sum(p.numel() for p in getattr(model, part).parameters())
            for part in ("decoder", "lm_head", "projector", "vision_tower")
        }
        assert count["decoder"] + count["lm_head"] == text
        assert count["vision_tower"] == vision
        assert count["projector"] == projector


def test_sampling_is_seeded_and_follows_the_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)
    draw = choose(logits, 1.0, 1.0, 0, torch.Generator().manual_seed(0))
    assert torch.equal(draw, choose(logits, 1.0, 1.0, 0, torch.Generator().manual_seed(0)))
    shares = torch.bincount(draw, minlength=4) / len(draw)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    nucleus = choose(logits, 1.0, 0.7, 0, torch.Generator().manual_seed(0))
    assert set(nucleus.tolist()) == {0, 1}
    assert set(choose(logits, 1.0, 1.0, 3, torch.Generator().manual_seed(0)).tolist()) == {0, 1, 2}
    assert set(choose(logits, 0.0, 1.0, 0, torch.Generator()).tolist()) == {0}


def test_generation_stops_at_stop_tokens():
    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    batch = tiny_batch()
    free = model.generate(batch, max_new_tokens=12, stop_ids=())
    stop = free[0][3]
    cut = model.generate(batch, max_new_tokens=12, stop_ids=(stop,))
    assert cut[0] == free[0][: free[0].index(stop)]
