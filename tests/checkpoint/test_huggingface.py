"""transformers' LLaVA directories: every layout read, what we write loaded by transformers, logits equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.checkpoint import config_of, load_model, save_model
from llava_fast.checkpoint.huggingface import fold_linear
from llava_fast.errors import CheckpointError, ConfigError
from tests.checkpoint.helpers import (
    IMAGE,
    VISION,
    VOCAB,
    assert_same_logits,
    edit_json,
    our_logits,
    reference,
    rename,
    their_logits,
)


@pytest.fixture(scope="module")
def theirs() -> LlavaForConditionalGeneration:
    return reference()


@pytest.fixture(scope="module")
def saved(theirs: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def to_hub(name: str) -> str:
    """transformers 5's saved names -> those of the files on the hub."""
    return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)


def to_4_52(name: str) -> str:
    """-> names of transformers 4.52 in memory."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + to_hub(name).replace("language_model.model.", "language_model.")


def to_mix(name: str) -> str:
    """Tower as 5.2x has it in memory, decoder as on the hub, projector as 4.52."""
    if name.startswith("language_model."):
        return name
    return "model." + name


@pytest.mark.parametrize("change", [None, to_hub, to_4_52, to_mix])
def test_layouts(theirs: LlavaForConditionalGeneration, copy: Path, change: Callable[[str], str] | None) -> None:
    before = set(load_file(copy / "model.safetensors"))
    if change:
        rename(copy, change)
        assert set(load_file(copy / "model.safetensors")) != before
    assert_same_logits(load_model(copy), theirs)


def test_names_in_memory_of_transformers_5(theirs: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(load_model(tmp_path), theirs)


def test_old_buffers_are_ignored(theirs: LlavaForConditionalGeneration, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    save_file(tensors, copy / "model.safetensors")
    assert_same_logits(load_model(copy), theirs)


def test_two_spellings_of_one_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="two spellings"):
        load_model(copy)


@pytest.mark.parametrize("kind", ["sharded safetensors", "bin", "legacy bin", "sharded bin", "unnamed safetensors"])
def test_files(theirs: LlavaForConditionalGeneration, saved: Path, tmp_path: Path, kind: str) -> None:
    theirs.config.save_pretrained(tmp_path)
    tensors = load_file(saved / "model.safetensors")
    names = sorted(tensors)
    halves = [{n: tensors[n] for n in half} for half in (names[::2], names[1::2])]
    if kind == "sharded safetensors":
        theirs.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    elif kind == "sharded bin":
        for i, half in enumerate(halves):
            torch.save(half, tmp_path / f"pytorch_model-{i}.bin")
        weight_map = {n: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for n in half}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif kind == "unnamed safetensors":
        for i, half in enumerate(halves):
            save_file(half, tmp_path / f"part{i}.safetensors")
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    assert_same_logits(load_model(tmp_path), theirs)


CASES: dict[str, dict[str, Any]] = {
    "grouped-query heads": {"text": {"num_key_value_heads": 2}},
    "head_dim of its own": {"text": {"head_dim": 16}},
    "tied": {"text": {"tie_word_embeddings": True}},
    "last layer": {"vision_feature_layer": -1},
    "layer from the front": {"vision_feature_layer": 2},
    "no projector biases": {"multimodal_projector_bias": False},
    "linear projector": {"projector_hidden_act": "linear"},
    "linear without biases": {"projector_hidden_act": "linear", "multimodal_projector_bias": False},
    "other base": {"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
    "rope linear": {"text": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}},
    "rope llama3": {
        "text": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        }
    },
    "rope yarn": {
        "text": {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        }
    },
}


@pytest.mark.parametrize("case", CASES)
def test_reads_and_writes(case: str, tmp_path: Path) -> None:
    """transformers' model, read by us, then written by us and read by transformers, all with the same logits."""
    theirs = reference(**CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    save_model(ours, tmp_path / "ours")
    assert_same_logits(ours, load_whole(tmp_path / "ours"))
    again = load_model(tmp_path / "ours")
    assert_bit_equal(again, ours)


def load_whole(directory: Path) -> LlavaForConditionalGeneration:
    """transformers' load of a directory; fails when a tensor is missing, left over or of another shape."""
    model, info = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def assert_bit_equal(a: lf.Llava, b: lf.Llava) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(weight, theirs[name]), name


def test_config_of_transformers_4(theirs: LlavaForConditionalGeneration, copy: Path) -> None:
    """``torch_dtype``, ``rope_theta`` and ``rope_scaling`` say what ``dtype`` and ``rope_parameters`` do."""
    new = config_of(copy)
    fields = json.loads((copy / "config.json").read_text())
    text = fields["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": text.pop("dtype", "float32")}
    fields["torch_dtype"] = fields.pop("dtype")
    (copy / "config.json").write_text(json.dumps(fields))
    assert config_of(copy) == new
    text["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(fields))
    assert config_of(copy).text.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_config_of_the_hub(tmp_path: Path) -> None:
    """The sparse config.json of llava-1.5-7b-hf (reference facts 1.10) against transformers' own defaults."""
    fields = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs, ours = LlavaConfig.from_pretrained(tmp_path), config_of(tmp_path)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(ours.text, name) == getattr(theirs.text_config, name)
    for name in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "head_dim"):
        assert getattr(ours.text, name) == getattr(theirs.text_config, name)
    for name in (*VISION, "layer_norm_eps", "hidden_act"):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name)
    assert (ours.projector, ours.image_token_id, ours.dtype) == ("mlp2x_gelu", 32000, "float16")
    assert ours.text.pad_token_id == 32001
    assert ours.tokens_per_image == 576


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision_feature_layer", [-2, -3], "only one layer"),
        ("projector_hidden_act", "relu", "projector_hidden_act='relu'"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "siglip_vision_model"),
        ("text_config", {"model_type": "mistral"}, "mistral"),
        ("text_config", {"model_type": "llama", "attention_bias": True}, "attention_bias=True"),
        ("model_type", "llava_next", "llava_next"),
    ],
)
def test_what_is_not_supported_is_refused(copy: Path, field: str, value: object, message: str) -> None:
    edit_json(copy / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(copy)


def test_dynamic_rope_is_refused(copy: Path) -> None:
    fields = json.loads((copy / "config.json").read_text())
    fields["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="dynamic"):
        load_model(copy)


def test_class_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.checkpoint.helpers.PATCHES", 17)
    theirs = reference(vision_feature_select_strategy="full", image_seq_length=17)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert_same_logits(ours, theirs)
    save_model(ours, tmp_path / "ours")
    assert_same_logits(ours, load_whole(tmp_path / "ours"))


def test_fold_of_an_identity_is_exact_and_of_a_product_is_close() -> None:
    generator = torch.Generator().manual_seed(0)
    w1, b1, w2, b2 = (torch.randn(s, generator=generator, dtype=torch.bfloat16) for s in [(6, 4), (6,), (6, 6), (6,)])
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    p = "multi_modal_projector."
    four = {f"{p}linear_1.weight": w1, f"{p}linear_1.bias": b1, f"{p}linear_2.weight": w2, f"{p}linear_2.bias": b2}
    folded = fold_linear(four)
    expected = (x @ w1.double().T + b1.double()) @ w2.double().T + b2.double()
    got = x @ folded[f"{p}linear_1.weight"].double().T + folded[f"{p}linear_1.bias"].double()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    same = fold_linear(four | {f"{p}linear_2.weight": torch.eye(6).bfloat16(), f"{p}linear_2.bias": torch.zeros(6)})
    assert same[f"{p}linear_1.weight"] is w1
    assert same[f"{p}linear_1.bias"] is b1


def test_sharded_write(theirs: LlavaForConditionalGeneration, saved: Path, tmp_path: Path) -> None:
    """A save over an older one of another number of files leaves no file of the older one."""
    ours = load_model(saved)
    save_model(ours, tmp_path)
    save_model(ours, tmp_path, shard_bytes=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        assert len(load_file(shard)) == 1 or shard.stat().st_size < 110_000
    assert_same_logits(ours, load_whole(tmp_path))
    assert_bit_equal(load_model(tmp_path), ours)
    save_model(ours, tmp_path)
    assert not list(tmp_path.glob("model-*"))
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert_bit_equal(load_model(tmp_path), ours)


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_grows_where_it_holds_no_image_token(tmp_path: Path, tied: bool) -> None:
    theirs = reference({"tie_word_embeddings": tied})
    theirs.save_pretrained(tmp_path / "theirs")
    edit_json(tmp_path / "theirs" / "config.json", image_token_index=-200)
    ours = load_model(tmp_path / "theirs")
    written = save_model(ours, tmp_path / "ours")
    assert (written.image_token_id, written.text.pad_token_id, written.text.vocab_size) == (VOCAB, VOCAB + 1, 128)
    grown = load_whole(tmp_path / "ours")
    assert grown.config.image_token_index == VOCAB
    logits = their_logits(grown, VOCAB)
    assert logits.shape[1] == 128
    torch.testing.assert_close(logits[:, :VOCAB], our_logits(ours), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        logits[:, VOCAB:], logits[:, :VOCAB].mean(1, keepdim=True).expand(-1, 32), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(our_logits(load_model(tmp_path / "ours")), logits, atol=1e-4, rtol=0)


def test_linear_is_written_as_identity(tmp_path: Path, saved: Path) -> None:
    ours = lf.Llava(config_of(saved).replace(projector="linear"), seed=3)
    save_model(ours, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert fields["projector_hidden_act"] == "linear"
    assert torch.equal(tensors["multi_modal_projector.linear_2.weight"], torch.eye(48))
    assert not tensors["multi_modal_projector.linear_2.bias"].any()
    assert_same_logits(ours, load_whole(tmp_path))
    assert_bit_equal(load_model(tmp_path), ours)


def test_own_fields_survive(tmp_path: Path, saved: Path) -> None:
    config = config_of(saved).replace(template="v0", image_aspect="pad", image_start_token_id=91, image_end_token_id=92)
    save_model(lf.Llava(config, seed=0), tmp_path)
    assert config_of(tmp_path) == config
    assert config_of(saved).template == "v1"


@pytest.mark.parametrize(
    ("file", "content", "aspect"),
    [
        ("preprocessor_config.json", {"do_pad": True}, "pad"),
        ("preprocessor_config.json", {"do_center_crop": True}, "square"),
        ("processor_config.json", {"image_processor": {"do_pad": True}}, "pad"),
    ],
)
def test_aspect_follows_the_preprocessor(copy: Path, file: str, content: dict[str, Any], aspect: str) -> None:
    (copy / file).write_text(json.dumps(content))
    assert config_of(copy).image_aspect == aspect


def test_dtype(theirs: LlavaForConditionalGeneration, saved: Path, copy: Path) -> None:
    ours = load_model(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    weight = theirs.model.language_model.layers[0].self_attn.k_proj.weight
    assert torch.equal(ours.decoder.layers[0].qkv.weight[48:96], weight.bfloat16())
    save_model(ours, copy)
    back = load_model(copy)
    assert back.dtype == torch.bfloat16
    assert_bit_equal(back, ours)
    assert load_whole(copy).dtype == torch.bfloat16


def test_faults_are_listed_together(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["language_model.model.norm.weight"]
    tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(48, 60)
    save_file(tensors, file)
    edit_json(copy / "config.json", image_token_index=IMAGE)
    with pytest.raises(CheckpointError) as caught:
        load_model(copy)
    message = str(caught.value)
    assert "1 missing: language_model.model.norm.weight" in message
    assert "1 unexpected: language_model.model.layers.0.self_attn.q_proj.bias (48,)" in message
    assert "multi_modal_projector.linear_1.weight is (48, 60)" in message
    assert "makes it (48, 64)" in message
    assert str(file) in message


def test_vocabulary_that_differs_from_the_config(copy: Path) -> None:
    fields = json.loads((copy / "config.json").read_text())
    fields["text_config"]["vocab_size"] = 100
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \(96, 48\).*\(100, 48\)"):
        load_model(copy)


def test_long_lists_are_shortened(copy: Path) -> None:
    fields = json.loads((copy / "config.json").read_text())
    fields["text_config"]["num_hidden_layers"] = 9
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"63 missing: .* and 43 more"):
        load_model(copy)


def test_packed_weights_are_explained(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(1920, 1, dtype=torch.uint8)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="without quantization"):
        load_model(copy)
