"""The whole model with every op on its Triton kernel, interpreted on a CPU: against transformers, and trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import llava_fast as lf
import llava_kernels
from llava_fast.checkpoint import load_model
from tests import transformers_llava as hf


@pytest.fixture(params=["linear", "mlp2x_gelu"], scope="module")
def pair(request, tmp_path_factory):
    theirs = hf.make(layers=1, **({"projector": "linear"} if request.param == "linear" else {"kv_heads": 2}))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


def test_logits_loss_and_gradients(pair):
    """What transformers gives, within the bounds of the plain path; and the gradients of the plain path."""
    theirs, ours = pair
    ids, pixels = hf.sequences([1, 0], 16)
    batch = hf.pack(ids, pixels)
    expected = torch.cat(hf.run_each(theirs, ids, pixels)).detach()
    plain = gradients(ours, batch)
    with llava_kernels.implementation("triton"):
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(batch), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(ours.loss(batch), F.cross_entropy(expected, batch.labels), rtol=1e-3, atol=0)
        fused = gradients(ours, batch)
    assert fused.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def gradients(model: lf.Llava, batch: lf.PackedBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_greedy_tokens(pair):
    _, ours = pair
    batch = hf.pack(*hf.sequences([1, 0], 16))
    plain = ours.generate(batch, max_new_tokens=4, stop_ids=())
    with llava_kernels.implementation("triton"):
        assert ours.generate(batch, max_new_tokens=4, stop_ids=()) == plain


def test_stage_1_moves_the_projector_alone():
    """Frozen weights get no gradient from any kernel, and a step lowers the loss."""
    config = lf.ModelConfig.preset("tiny")
    model = lf.Llava(config.replace(text=dataclasses.replace(config.text, num_hidden_layers=1)))
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    ids = torch.tensor([1] + [4] * 9 + [7, 8, 9, 10])
    labels = torch.where(ids.roll(-1) == 4, -100, ids.roll(-1))
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    batch = lf.PackedBatch(ids, labels, torch.arange(14).int(), torch.tensor([0, 14]).int(), pixels, 4)
    with llava_kernels.implementation("triton"):
        before = model.loss(batch)
        before.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            "projector.linear_1.weight",
            "projector.linear_1.bias",
        }
        with torch.no_grad():
            for parameter in model.projector.parameters():
                parameter -= 0.1 * parameter.grad / parameter.grad.norm()
        assert model.loss(batch) < before
