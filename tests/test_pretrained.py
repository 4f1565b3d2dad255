"""load and save: model and processor together, checked with transformers' own processor and tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.checkpoint import save_llama, save_model
from llava_fast.config import TextConfig, VisionConfig
from llava_fast.data.scenes import held_out
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.pretrained import built_in, load, save
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import answer
from tests.realdata import real_data

# Small, with the vocabulary of the real LLaMA tokenizer.
CONFIG = lf.ModelConfig(
    vision=VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    ),
    text=TextConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
    ),
)
SAMPLE = {
    "id": "1",
    "image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)),
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "Noise, I think."},
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(real_data("tokenizer", "llama2_tokenizer.model"))


def made(config: lf.ModelConfig, tokenizer: Tokenizer) -> tuple[lf.Llava, Processor]:
    model = lf.Llava(config, seed=0)
    return model, Processor.from_config(config, tokenizer)


@torch.no_grad()
def logits(model: lf.Llava, processor: Processor) -> torch.Tensor:
    return model.logits(processor.pack([SAMPLE]))


@torch.no_grad()
def their_logits(directory: Path, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    model, info = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(input_ids=ids[None], pixel_values=pixels).logits[0]


def test_model_without_an_image_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The vocabulary grows in model and tokenizer; old ids keep their logits; transformers agrees on ids and logits."""
    model, processor = made(CONFIG, tokenizer)
    save(model, processor, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    assert (theirs.pad_token, len(theirs)) == ("<pad>", 32002)
    back, back_processor = load(tmp_path)
    assert back.config.text.vocab_size == 32064
    assert back_processor.image_token_id == back.config.image_token_id == 32000
    assert back_processor.tokenizer.pad_id == back.config.text.pad_token_id == 32001
    expected = logits(model, processor)
    torch.testing.assert_close(logits(back, back_processor)[:, :32000], expected, atol=1e-5, rtol=0)
    batch = back_processor.pack([SAMPLE])
    torch.testing.assert_close(
        their_logits(tmp_path, batch.input_ids, batch.pixel_values)[:, :32000], expected, atol=1e-4, rtol=0
    )


def test_transformers_processor_prepares_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, processor = made(CONFIG, tokenizer)
    save(model, processor, tmp_path)
    theirs = AutoProcessor.from_pretrained(tmp_path)
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    prepared = theirs(images=SAMPLE["image"], text=prompt, return_tensors="pt")
    assert int((prepared["input_ids"] == 32000).sum()) == 16
    ours = load(tmp_path)[1].pack([SAMPLE])
    torch.testing.assert_close(prepared["pixel_values"], ours.pixel_values, atol=0.02, rtol=0)  # one grey level


def test_spare_row_becomes_the_image_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = CONFIG.replace(text=replace(CONFIG.text, vocab_size=32064))
    model, processor = made(config, tokenizer)
    save(model, processor, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<image>") == 32000
    back, back_processor = load(tmp_path)
    assert back.config == config.replace(image_token_id=32000, dtype="float32")
    assert torch.equal(logits(back, back_processor), logits(model, processor))


def test_image_token_that_the_tokenizer_has(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = CONFIG.replace(text=replace(CONFIG.text, vocab_size=32064))
    model, processor = made(config, tokenizer.with_token("<image>", 32003))
    save(model, processor, tmp_path)
    assert load(tmp_path)[0].config.image_token_id == 32003


@pytest.mark.parametrize("format", ["hf", "authors"])
def test_round_trip(tokenizer: Tokenizer, tmp_path: Path, format: str) -> None:
    """A second save and load changes nothing: neither bits nor what is prepared."""
    text = replace(CONFIG.text, vocab_size=32002, pad_token_id=0)
    config = CONFIG.replace(
        text=text, image_token_id=32000, image_aspect="pad", projector="mlp2x_gelu", dtype="float32"
    )
    model, processor = made(config, tokenizer)
    save(model, processor, tmp_path, format=format)
    back, back_processor = load(tmp_path)
    assert back.config == config
    for name, weight in model.named_parameters():
        assert torch.equal(weight, back.get_parameter(name))
    ours, theirs = processor.pack([SAMPLE]), back_processor.pack([SAMPLE])
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.pixel_values, theirs.pixel_values)


def test_options(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(*made(CONFIG, tokenizer), tmp_path)
    model, _ = load(tmp_path, dtype=torch.bfloat16, attention="reference")
    assert (model.dtype, model.attention) == (torch.bfloat16, "reference")
    with pytest.raises(ConfigError, match=r"quantization='int3' is not known; choose one of int8, int4, fp8"):
        load(tmp_path, quantization="int3")
    with pytest.raises(ConfigError, match="format='gguf'"):
        save(*made(CONFIG, tokenizer), tmp_path / "x", format="gguf")


def test_other_image_statistics_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(*made(CONFIG, tokenizer), tmp_path)
    file = tmp_path / "preprocessor_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"image_mean": [0.5, 0.5, 0.5]}))
    assert load(tmp_path)[1].image.mean == pytest.approx([0.5, 0.5, 0.5])
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    file.write_text(json.dumps(fields | size))
    with pytest.raises(ConfigError, match=r"64 pixels.*takes 32"):
        load(tmp_path)


def test_tokenizer_of_the_base(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A delta directory without tokenizer files takes its base's."""
    model, _ = made(CONFIG, tokenizer)
    save_model(model, tmp_path / "delta", format="authors")
    tokenizer.save(tmp_path / "base")
    save_llama(model, tmp_path / "base")
    loaded, loaded_processor = load(tmp_path / "delta", base=tmp_path / "base")
    assert loaded_processor.tokenizer.vocab_size == 32000
    assert torch.equal(loaded.lm_head.weight, 2 * model.lm_head.weight)


def test_hub(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(*made(CONFIG, tokenizer), tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    load("someone/llava-small")
    assert asked == ["someone/llava-small"]

    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"someone/llava-small.*no directory.*hub repository.*no network here"):
        load("someone/llava-small")


def test_the_built_in_model_answers_about_scenes():
    """Questions whose right answer is known from how the picture was drawn; guessing reaches a quarter of them."""
    model, processor = load(built_in(), dtype=torch.float32)
    quizzes = held_out(60, seed=77)
    said = answer(model, processor, quizzes, [quiz.image for quiz in quizzes])
    assert sum(text == quiz.answer for text, quiz in zip(said, quizzes, strict=True)) >= 54
