"""LoRA adapters against PEFT on transformers' models: what PEFT writes is read here, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.checkpoint import config_of, load_model, save_model
from llava_fast.checkpoint.adapter import low_rank_views
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.model.lora import TARGETS, LoraConfig, attach, merge
from tests.checkpoint.helpers import assert_same_logits, edit_json, our_logits, reference
from tests.checkpoint.test_authors import CONFIG, MLP, authors_tensors, write_clip

PATTERN = rf".*language_model\..*\.({'|'.join(TARGETS)})"


@pytest.fixture(scope="module", params=["gelu", "linear"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers LLaVA directory; with the act linear, W2 is the identity, as a linear projector is written."""
    model = reference(text={"num_key_value_heads": 2}, projector_hidden_act=request.param)
    if request.param == "linear":
        second = model.model.multi_modal_projector.linear_2
        torch.nn.init.eye_(second.weight)
        torch.nn.init.zeros_(second.bias)
    folder = tmp_path_factory.mktemp(f"base-{request.param}")
    model.save_pretrained(folder)
    return folder


def theirs(base: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(base).eval()


def of_peft(base: Path, folder: Path, **changes: Any) -> PeftModel:
    """An adapter that PEFT makes, fills with noise and saves."""
    fields = {"r": 3, "lora_alpha": 7, "target_modules": PATTERN, "modules_to_save": ["multi_modal_projector"]}
    config = PeftConfig(base_model_name_or_path=str(base), **(fields | changes))
    model = get_peft_model(theirs(base), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():  # adapters and the whole projector, W2 too where it was the identity
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def fill_with_noise(model: lf.Llava) -> None:
    generator = torch.Generator().manual_seed(6)
    for views in low_rank_views(model).values():
        for view in views:
            view.copy_(torch.randn(view.shape, generator=generator) * 0.1)
    for weight in model.projector.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_is_read_merged_and_beside(base: Path, tmp_path: Path, rslora: bool) -> None:
    adapted = of_peft(base, tmp_path, use_rslora=rslora)
    assert_same_logits(load_model(tmp_path), adapted)
    kept = load_model(tmp_path, merge_adapter=False)
    assert_same_logits(kept, adapted)
    assert any(name.endswith("lora_A") for name, _ in kept.named_parameters())
    merge(kept)
    assert_same_logits(kept, adapted)
    assert not any("lora_" in name for name, _ in kept.named_parameters())


def test_some_targets_alone(base: Path, tmp_path: Path) -> None:
    """PEFT's usual two: the key in the middle of the merged product has no adapter."""
    pattern = r".*language_model\..*\.(q_proj|v_proj|up_proj)"
    adapted = of_peft(base, tmp_path, target_modules=pattern)
    kept = load_model(tmp_path, merge_adapter=False)
    assert_same_logits(kept, adapted)
    assert_same_logits(load_model(tmp_path), adapted)


def test_adapters_on_the_tower_and_one_layer_are_merged(base: Path, tmp_path: Path) -> None:
    adapted = of_peft(base, tmp_path, target_modules=r".*(vision_tower.*|language_model\.layers\.1.*)\.q_proj")
    assert_same_logits(load_model(tmp_path), adapted)
    with pytest.raises(CheckpointError, match=r"cannot be kept beside the weights.*merge_adapter=True"):
        load_model(tmp_path, merge_adapter=False)


def test_what_is_written_peft_reads_with_equal_logits(base: Path, tmp_path: Path) -> None:
    ours = load_model(base)
    attach(ours, LoraConfig(rank=4, alpha=6, dropout=0.25, base=str(base)))
    assert_same_logits(ours, theirs(base))  # B is zero: nothing is changed yet
    before = our_logits(ours)
    fill_with_noise(ours)
    assert (our_logits(ours) - before).abs().max() > 0.1
    save_model(ours, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    assert_same_logits(ours, adapted)
    assert_same_logits(ours, LlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter").eval())
    again = load_model(tmp_path / "adapter", merge_adapter=False)
    for a, b in zip(again.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.config == ours.config.replace(dtype="float32") == config_of(tmp_path / "adapter")
    # Merged, as the merge command does it, and loaded by transformers.
    save_model(load_model(tmp_path / "adapter"), tmp_path / "merged")
    assert_same_logits(ours, theirs(tmp_path / "merged"))


def test_names_are_those_that_peft_writes(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    of_peft(base, tmp_path / "peft")
    ours = load_model(base)
    attach(ours, LoraConfig(rank=3, alpha=7, base=str(base)))
    save_model(ours, tmp_path / "ours")
    expected = {n: t.shape for n, t in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}
    assert {n: t.shape for n, t in load_file(tmp_path / "ours" / "adapter_model.safetensors").items()} == expected


def test_names_of_older_transformers(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapted = of_peft(base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {
        n.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.multi", "model.multi"
        ): t
        for n, t in load_file(file).items()
    }
    assert not set(old) & set(load_file(file))
    save_file(old, file, metadata={"format": "pt"})
    assert_same_logits(load_model(tmp_path), adapted)


# ---- the authors' ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["mlp2x_gelu", "linear"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[lf.Llava, Path, Path]:
    """A model joined of CLIP and LLaMA directories that transformers wrote, and the two."""
    whole = reference()
    clip = write_clip(whole, tmp_path / "clip")
    llama = LlamaForCausalLM(whole.config.text_config)
    state = {n.replace("model.language_model.", "model."): t for n, t in whole.state_dict().items()}
    llama.load_state_dict({n: t for n, t in state.items() if n in llama.state_dict()})
    llama.save_pretrained(tmp_path / "llama")
    return lf.checkpoint.join(clip, tmp_path / "llama", projector=request.param), clip, tmp_path / "llama"


def test_authors_adapter_over_llama(parts: tuple[lf.Llava, Path, Path], tmp_path: Path) -> None:
    model, clip, llama = parts
    attach(model, LoraConfig(rank=4, alpha=8, base=str(llama), vision_tower=str(clip)))
    fill_with_noise(model)
    save_model(model, tmp_path / "llava-lora")
    files = {f.name for f in (tmp_path / "llava-lora").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json"}
    extra = torch.load(tmp_path / "llava-lora" / "non_lora_trainables.bin", weights_only=True)
    first = "weight" if model.config.projector == "linear" else "0.weight"
    assert torch.equal(extra[f"base_model.model.model.mm_projector.{first}"], model.projector.linear_1.weight)
    # PEFT puts the adapter on the LLaMA, as the authors' loader does: the merged decoders are the same.
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "llava-lora")
    decoder = merged.merge_and_unload().state_dict()
    read = load_model(tmp_path / "llava-lora")
    ours = lf.checkpoint.names.canonical_tensors(read, only="language_model.")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, decoder[name.removeprefix("language_model.")], atol=1e-6, rtol=0)
    torch.testing.assert_close(our_logits(read), our_logits(model), atol=1e-4, rtol=0)
    kept = load_model(tmp_path / "llava-lora", merge_adapter=False)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True))


def test_authors_adapter_over_their_own_directory(tmp_path: Path) -> None:
    """As finetune_task_lora.sh: the base is a LLaVA of theirs; a ``.bin`` adapter, projector in non_lora_trainables."""
    from safetensors.torch import load_file, save_file

    whole = reference()
    clip = write_clip(whole, tmp_path / "clip")
    (tmp_path / "base").mkdir()
    save_file(authors_tensors(whole, linear=False), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG | MLP | {"mm_vision_tower": str(clip)}))
    model = load_model(tmp_path / "base")
    attach(model, LoraConfig(rank=2, alpha=3, base=str(tmp_path / "base")))
    fill_with_noise(model)
    folder = tmp_path / "lora"
    save_model(model, folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(our_logits(load_model(folder)), our_logits(model), atol=1e-4, rtol=0)


# ---- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora=True is not supported; merge the adapter with PEFT"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": None}, "gives no rank"),
        ({"r": 5}, "rank of .* is 3, adapter_config.json says 5"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path; give it as base"),
    ],
)
def test_what_is_not_supported_is_refused(base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    of_peft(base, tmp_path)
    edit_json(tmp_path / "adapter_config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_another_base_and_a_missing_half_are_named(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    of_peft(base, tmp_path / "a")
    reference(text={"hidden_size": 64, "num_key_value_heads": 2}).save_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"does not belong to its base: .*q_proj.weight is \(64, 64\) in the base"
    ):
        load_model(tmp_path / "a", base=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"the base 'no/where' of the adapter .* give it as base"):
        load_model(tmp_path / "a", base="no/where")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "q_proj.lora_B" not in n}, file)
    with pytest.raises(CheckpointError, match=r"A or B is missing of .*q_proj"):
        load_model(tmp_path / "a")


def test_quantized_after_merging_and_never_written_whole_with_adapters(base: Path, tmp_path: Path) -> None:
    adapted = of_peft(base, tmp_path / "a")
    rounded = load_model(tmp_path / "a", quantization="int8")
    with torch.no_grad():
        plain = our_logits(load_model(tmp_path / "a"))
    assert (our_logits(rounded) - plain).abs().max() < 0.1 * plain.abs().max()
    del adapted
    kept = load_model(tmp_path / "a", merge_adapter=False)
    with pytest.raises(ConfigError, match="merge them first"):
        save_model(kept, tmp_path / "b", format="authors")
    with pytest.raises(ConfigError, match="has LoRA adapters already"):
        attach(kept, LoraConfig(rank=1, alpha=1))
    nameless = load_model(base)
    attach(nameless, LoraConfig(rank=1, alpha=1))
    with pytest.raises(ConfigError, match="name no base"):
        save_model(nameless, tmp_path / "c")
