"""benches/perplexity.py on the built-in model: what int8 and int4 cost, through the engine."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

import llava_fast as lf
from benches import perplexity
from benches.scienceqa_decoder import encoded, make, packed, steps, texts, train
from llava_fast.config import TextConfig
from llava_fast.pretrained import built_in
from llava_fast.processor import Tokenizer
from llava_kernels import quantized_linear

# Of the mean loss, far below 1 here: a smaller change of it than the 1% and 5% of perplexity.
BOUNDS = {"int8": 1.01, "int4": 1.06, "int4-few": 1.06}


def losses(kinds: tuple[str, ...]) -> dict[str, float]:
    found = perplexity.measure(built_in(), partial(perplexity.scenes, count=60), kinds)
    assert all(row["tokens"] == found["bf16"]["tokens"] > 1000 for row in found.values())
    assert found["bf16"]["layer_bytes"] > 1.8 * found.get("int8", {}).get("layer_bytes", 0)
    return {kind: math.log(row["perplexity"]) for kind, row in found.items()}


def test_rounding_costs_little():
    found = losses(("bf16", *BOUNDS))
    assert found["bf16"] < 0.03  # a trained model
    for kind, bound in BOUNDS.items():
        assert found[kind] / found["bf16"] < bound, kind


def test_three_bits_would_not_do(monkeypatch):
    """The measurement notices a coarser rounding."""
    real = quantized_linear._round_int4

    def coarser(groups, part):
        codes, scale, offset = real(groups, part)
        return torch.round(codes / 2) * 2, scale, offset

    monkeypatch.setattr(quantized_linear, "_round_int4", coarser)
    found = losses(("bf16", "int4"))
    assert found["int4"] / found["bf16"] > BOUNDS["int4"]


def test_perplexity_is_that_of_the_model_itself():
    """Against the model's own logits, and with a picture's rows between the words."""
    model, processor = lf.load(built_in(), dtype=torch.float32)
    passages = perplexity.scenes(processor, count=3)
    total = tokens = 0
    for passage in passages:
        prompt = processor.prompt_of_ids(passage.token_ids, passage.images)
        logits = model.logits(processor.collate([prompt])).log_softmax(-1)
        ids = torch.tensor(prompt.input_ids)
        for place in passage.scored:
            total -= logits[place - 1, ids[place]].item()
            tokens += 1
    with lf.Engine(model, processor, background=False) as engine:
        value, scored = perplexity.perplexity(engine, passages)
    assert scored == tokens and value == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_training_on_problems(tmp_path: Path, monkeypatch, capsys):
    """Problems of the split "val" are left out; a minute's model is better than chance; both scripts run."""
    problem = {"question": "Which is red?", "choices": ["the apple", "the sky"], "answer": 0, "hint": "", "image": None}
    problem |= {"lecture": "Apples are red.", "solution": "The apple is."}
    table = {str(i): problem | {"split": "val" if i == 3 else "train"} for i in range(8)}
    file = tmp_path / "problems.json"
    file.write_text(json.dumps(table))
    assert [len(texts(file, held_out=held)) for held in (False, True)] == [7, 1]

    tokenizer = Tokenizer.load(built_in())
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    model, processor = make(tokenizer, TextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, **heads))
    sequences = [encoded(text, tokenizer, 512) for text in texts(file, held_out=False)]
    assert sorted(s for batch in steps(sequences, seed=0) for s in batch) == sorted(sequences)
    batch = packed(sequences[:2], model)
    before = model.loss(batch).item()
    assert batch.num_supervised == batch.num_tokens - 2
    assert before == pytest.approx(math.log(model.config.text.vocab_size), rel=0.05)  # knows nothing yet
    ticks = count()
    train(model, sequences, seconds=40, rate=3e-3, clock=lambda: float(next(ticks)))  # 40 steps
    assert model.loss(batch).item() < 0.85 * before
    lf.save(model, processor, tmp_path / "model")
    arguments = ["perplexity", str(tmp_path / "model"), "--problems", str(file), "--kinds", "bf16,int8", "--json"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "found.json")])
    assert perplexity.main() == 0
    assert "int8" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["int8"]["tokens"] == len(sequences[0]) - 1
