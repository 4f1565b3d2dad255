"""The network against transformers' LlavaForConditionalGeneration: logits, loss, every gradient, greedy tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava_fast.checkpoint import load_model
from llava_fast.checkpoint.names import canonical_parts
from tests import transformers_llava as hf

CASES = {
    "mlp": {},
    "linear": {"projector": "linear"},
    "grouped-query": {"kv_heads": 2},
    "one-kv-head-last-layer": {"kv_heads": 1, "select_layer": -1},
    "class-token": {"strategy": "full"},
    "linear-rope": {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3-rope": {
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn-rope": {
        "rope": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "deep-wide": {"layers": 4, "hidden": 128, "vocab": 500},
}
IMAGES = {"text": [0], "one": [1], "three": [3], "mixed": [1, 0, 3, 1, 0]}


@pytest.fixture(params=CASES, scope="module")
def pair(request, tmp_path_factory):
    """transformers' model, ours with the same weights, and how many rows an image takes."""
    case = CASES[request.param]
    theirs = hf.make(**case)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), 17 if case.get("strategy") == "full" else 16


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@torch.no_grad()
def test_logits(pair, images):
    theirs, ours, per_image = pair
    ids, pixels = hf.sequences(images, per_image)
    expected = torch.cat(hf.run_each(theirs, ids, pixels))
    torch.testing.assert_close(ours.logits(hf.pack(ids, pixels)), expected, atol=1e-4, rtol=0)


def test_loss_and_every_gradient(pair):
    theirs, ours, per_image = pair
    ids, pixels = hf.sequences([1, 0, 2], per_image)
    batch = hf.pack(ids, pixels)
    ours.zero_grad()
    theirs.zero_grad()
    loss = ours.loss(batch)
    loss.backward()
    expected = F.cross_entropy(torch.cat(hf.run_each(theirs, ids, pixels)), batch.labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradient_scale = max(g.norm() for g in gradients.values())
    compared = set()
    for name, parameter in ours.named_parameters():
        for canonical, rows in canonical_parts(ours.config)[name]:
            their_name = in_memory(canonical)
            compared.add(their_name)
            if their_name not in gradients:  # a layer of the tower that the feature does not need
                assert parameter.grad is None or not parameter.grad[rows].any()
                continue
            mine, reference = parameter.grad[rows], gradients[their_name]
            if canonical.endswith("k_proj.bias"):  # shifts all scores of a query alike: the true gradient is zero
                assert max(mine.norm(), reference.norm()) <= 1e-5 * gradient_scale, name
            else:
                assert (mine - reference).norm() <= 1e-3 * reference.norm(), name
    unmatched = set(gradients) - compared
    # With a linear projector, transformers' second matrix is the identity and has no counterpart.
    assert unmatched <= {f"model.multi_modal_projector.linear_2.{x}" for x in ("weight", "bias")}


def in_memory(canonical: str) -> str:
    """What transformers calls a tensor of the hub layout once loaded."""
    if canonical.startswith("language_model.lm_head"):
        return canonical.removeprefix("language_model.")
    name = canonical.replace("language_model.model.", "language_model.").replace(
        "vision_tower.vision_model.", "vision_tower."
    )
    return f"model.{name}"


def test_loss_is_the_mean_over_all_supervised_tokens(pair):
    """Two bins with a shared denominator give what one bin gives, whatever the share of each."""
    _, ours, per_image = pair
    ids, pixels = hf.sequences([1, 0, 2], per_image)
    whole = ours.loss(hf.pack(ids, pixels))
    count = hf.pack(ids, pixels).num_supervised
    parts = [ours.loss(hf.pack(ids[s], pixels[s]), denominator=count) for s in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)


def test_greedy_tokens(pair):
    theirs, ours, per_image = pair
    ids, pixels = hf.sequences([1, 0, 3], per_image)
    tokens = ours.generate(hf.pack(ids, pixels), max_new_tokens=64, stop_ids=())
    for row, image, mine in zip(ids, pixels, tokens, strict=True):
        out = theirs.generate(
            input_ids=row.unsqueeze(0),
            **({"pixel_values": image} if len(image) else {}),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert mine == out[0, len(row) :].tolist()
        assert len(set(mine)) > 5  # a model that repeats itself would prove little
