"""The parts of a model: CLIP and LLaMA directories, joined and written; projectors alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

import llava_fast as lf
from llava_fast.checkpoint import (
    canonical_parts,
    join,
    load_model,
    load_projector,
    save_clip,
    save_llama,
    save_projector,
)
from llava_fast.errors import CheckpointError, ConfigError
from tests.checkpoint.helpers import VISION, assert_same_logits, edit_json, reference, rename
from tests.checkpoint.test_authors import authors_tensors, linear_reference, write_clip


def write_llama(theirs: LlavaForConditionalGeneration, directory: Path) -> Path:
    llama = LlamaForCausalLM(theirs.config.text_config)
    llama.model.load_state_dict(theirs.model.language_model.state_dict())
    llama.lm_head.load_state_dict(theirs.lm_head.state_dict())
    llama.save_pretrained(directory)
    return directory


def write_projector(theirs: LlavaForConditionalGeneration, file: Path, *, linear: bool) -> Path:
    torch.save({n: t for n, t in authors_tensors(theirs, linear=linear).items() if "mm_projector" in n}, file)
    return file


@pytest.fixture(scope="module")
def theirs() -> LlavaForConditionalGeneration:
    return reference()


@pytest.fixture(scope="module")
def parts(theirs: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parts")
    write_clip(theirs, directory / "clip")
    write_llama(theirs, directory / "llama")
    write_projector(theirs, directory / "mm_projector.bin", linear=False)
    return directory


def test_joined_logits(theirs: LlavaForConditionalGeneration, parts: Path) -> None:
    ours = join(parts / "clip", parts / "llama", projector="mlp2x_gelu", projector_weights=parts / "mm_projector.bin")
    assert ours.dtype == torch.float32
    assert_same_logits(ours, theirs)


def test_joined_linear_and_tied(tmp_path: Path) -> None:
    theirs = reference({"tie_word_embeddings": True}, projector_hidden_act="linear")
    with torch.no_grad():
        theirs.model.multi_modal_projector.linear_2.weight.copy_(torch.eye(48))
        theirs.model.multi_modal_projector.linear_2.bias.zero_()
    clip, llama = write_clip(theirs, tmp_path / "clip"), write_llama(theirs, tmp_path / "llama")
    assert "lm_head.weight" not in load_file(llama / "model.safetensors")
    ours = join(clip, llama, projector_weights=write_projector(theirs, tmp_path / "mm_projector.bin", linear=True))
    assert ours.lm_head is None
    assert_same_logits(ours, theirs)


def test_clip_with_its_text_half(theirs: LlavaForConditionalGeneration, parts: Path, tmp_path: Path) -> None:
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=50
    )
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**VISION).to_dict()))
    whole.vision_model.load_state_dict(theirs.model.vision_tower.state_dict())
    whole.save_pretrained(tmp_path)
    assert any(n.startswith("text_model.") for n in load_file(tmp_path / "model.safetensors"))
    ours = join(tmp_path, parts / "llama", projector="mlp2x_gelu", projector_weights=parts)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clip_with_and_without_a_prefix(theirs, parts: Path, tmp_path: Path, prefix: str) -> None:
    write_clip(theirs, tmp_path)
    rename(tmp_path, lambda n: prefix + n.removeprefix("vision_model."))
    ours = join(tmp_path, parts / "llama", projector="mlp2x_gelu", projector_weights=parts)
    assert_same_logits(ours, theirs)


def test_fresh_projector(parts: Path) -> None:
    one, same, other = (join(parts / "clip", parts / "llama", seed=seed).projector for seed in (1, 1, 2))
    assert torch.equal(one.linear_1.weight, same.linear_1.weight)
    assert not torch.equal(one.linear_1.weight, other.linear_1.weight)
    assert not one.linear_1.bias.any()
    bound = 64**-0.5
    assert one.linear_1.weight.abs().max() <= bound
    assert one.linear_1.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_join_options(parts: Path) -> None:
    ours = join(
        parts / "clip",
        parts / "llama",
        select_layer=-1,
        select_feature="cls_patch",
        image_aspect="pad",
        template="plain",
        dtype=torch.bfloat16,
    )
    config = ours.config
    assert (config.select_layer, config.select_feature, config.image_aspect) == (-1, "cls_patch", "pad")
    assert (config.template, ours.dtype) == ("plain", torch.bfloat16)
    with pytest.raises(ConfigError, match="projector='mlp3x'"):
        join(parts / "clip", parts / "llama", projector="mlp3x")


def test_parts_in_the_wrong_place(parts: Path) -> None:
    with pytest.raises(CheckpointError, match="llama"):
        join(parts / "llama", parts / "llama")
    with pytest.raises(CheckpointError, match="not a LLaMA decoder"):
        join(parts / "clip", parts / "clip")
    with pytest.raises(CheckpointError, match=r"one part of LLaVA.*join"):
        load_model(parts / "llama")


def test_written_parts_are_loaded_by_transformers(theirs, parts: Path, tmp_path: Path) -> None:
    ours = join(parts / "clip", parts / "llama")
    save_clip(ours, tmp_path / "clip")
    save_llama(ours, tmp_path / "llama", shard_bytes=50_000)
    tower, info = CLIPVisionModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert not any(info.values()), info
    for name, weight in theirs.model.vision_tower.state_dict().items():
        assert torch.equal(tower.state_dict()[name], weight)
    assert tower.config.to_dict().items() >= VISION.items()
    llama, info = LlamaForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert not any(info.values()), info
    for name, weight in theirs.model.language_model.state_dict().items():
        assert torch.equal(llama.model.state_dict()[name], weight)
    assert torch.equal(llama.lm_head.weight, theirs.lm_head.weight)
    again = join(tmp_path / "clip", tmp_path / "llama")
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))


def test_table_of_names_covers_every_row_once(theirs: LlavaForConditionalGeneration, parts: Path) -> None:
    ours = join(parts / "clip", parts / "llama", projector="mlp2x_gelu")
    table = canonical_parts(ours.config)
    shapes = {n: tuple(p.shape) for n, p in ours.named_parameters()}
    assert table.keys() == shapes.keys()
    state = {
        re.sub(r"^model\.", "", n)
        .replace("vision_tower.", "vision_tower.vision_model.")
        .replace("language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head."): tuple(t.shape)
        for n, t in theirs.state_dict().items()
    }
    seen = {}
    for name, pieces in table.items():
        end = 0
        for canonical, rows in pieces:
            assert rows.start == end
            end = rows.stop
            seen[canonical] = (rows.stop - rows.start, *shapes[name][1:])
        assert end == shapes[name][0]
    assert seen == state


PREFIXES = ["model.", "", "base_model.model.model.", "module.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_projector_files(parts: Path, tmp_path: Path, prefix: str, linear: bool, suffix: str) -> None:
    source = linear_reference() if linear else reference()
    tensors = authors_tensors(source, linear=linear)
    named = {prefix + n.removeprefix("model."): t for n, t in tensors.items() if "mm_projector" in n}
    file = tmp_path / f"mm_projector{suffix}"
    (torch.save if suffix == ".bin" else save_file)(named, file)
    ours = join(parts / "clip", parts / "llama", projector="linear" if linear else "mlp2x_gelu", projector_weights=file)
    theirs = source.model.multi_modal_projector
    assert torch.equal(ours.projector.linear_1.weight, theirs.linear_1.weight)
    assert torch.equal(ours.projector.linear_1.bias, theirs.linear_1.bias)
    if not linear:
        assert torch.equal(ours.projector.linear_2.weight, theirs.linear_2.weight)


def test_projector_in_transformers_names(theirs: LlavaForConditionalGeneration, parts: Path, tmp_path: Path) -> None:
    state = theirs.model.multi_modal_projector.state_dict()
    save_file({f"model.multi_modal_projector.{n}": t for n, t in state.items()}, tmp_path / "p.safetensors")
    ours = join(parts / "clip", parts / "llama", projector="mlp2x_gelu", projector_weights=tmp_path / "p.safetensors")
    assert torch.equal(ours.projector.linear_2.bias, state["linear_2.bias"])


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector_round_trip(parts: Path, tmp_path: Path, kind: str) -> None:
    ours = join(parts / "clip", parts / "llama", projector=kind, seed=5)
    save_projector(ours, tmp_path)
    names = set(load_file(tmp_path / "mm_projector.safetensors"))
    layers = [""] if kind == "linear" else ["0.", "2."]
    assert names == {f"model.mm_projector.{layer}{x}" for layer in layers for x in ("weight", "bias")}
    other = join(parts / "clip", parts / "llama", projector=kind, seed=6)
    load_projector(other, tmp_path)
    for name, weight in ours.projector.named_parameters():
        assert torch.equal(weight, other.projector.get_parameter(name))


def test_saving_a_projector_beside_a_model_keeps_the_model(parts: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_projector(join(parts / "clip", parts / "llama"), tmp_path / "stage1.safetensors")
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "stage1.safetensors"}


def test_projector_of_the_other_kind(parts: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of kind 'mlp2x_gelu', the model has 'linear'"):
        join(parts / "clip", parts / "llama", projector_weights=parts)


@pytest.mark.parametrize(("shape", "hint"), [((0,), "ZeRO-3"), ((1536, 1), "4-bit")])
def test_projector_of_strange_shape_is_explained(
    parts: Path, tmp_path: Path, shape: tuple[int, ...], hint: str
) -> None:
    file = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.weight": torch.zeros(shape), "model.mm_projector.bias": torch.zeros(48)}, file)
    with pytest.raises(CheckpointError, match=hint) as caught:
        join(parts / "clip", parts / "llama", projector_weights=file)
    assert str(shape) in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("whole_table", [True, False])
def test_marker_embeddings(parts: Path, tmp_path: Path, whole_table: bool) -> None:
    ours = join(parts / "clip", parts / "llama")
    before = ours.decoder.embed_tokens.detach().clone()
    rows = torch.randn(96 if whole_table else 2, 48)
    file = tmp_path / "mm_projector.bin"
    torch.save(
        {
            "model.mm_projector.weight": torch.ones(48, 64),
            "model.mm_projector.bias": torch.ones(48),
            "model.embed_tokens.weight": rows,
        },
        file,
    )
    with pytest.raises(CheckpointError, match="marker"):
        load_projector(ours, file)
    marked = lf.Llava(ours.config.replace(image_start_token_id=93, image_end_token_id=94), seed=None)
    marked.load_state_dict(ours.state_dict())
    load_projector(marked, file)
    after = marked.decoder.embed_tokens
    assert torch.equal(after[[93, 94]], rows[[93, 94]] if whole_table else rows)
    others = [i for i in range(96) if i not in (93, 94)]
    assert torch.equal(after[others], before[others])
    assert (marked.projector.linear_1.weight == 1).all()


def test_llama_config_of_another_size(parts: Path, tmp_path: Path) -> None:
    for file in (parts / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "config.json", vocab_size=32000)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \(96, 48\).*\(32000, 48\)"):
        join(parts / "clip", tmp_path)
