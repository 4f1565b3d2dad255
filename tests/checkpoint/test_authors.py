"""The authors' directories, made by renaming transformers' tensors: logits equal transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.checkpoint import config_of, load_model, save_model
from llava_fast.checkpoint.names import canonical_tensors
from llava_fast.config import IMAGE_SENTINEL
from llava_fast.errors import CheckpointError
from tests.checkpoint.helpers import TEXT, VISION, assert_same_logits, edit_json, our_logits, reference

CONFIG = TEXT | {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "torch_dtype": "float32",
    "mm_hidden_size": 64,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "use_mm_proj": True,
}
MLP = {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}


def authors_tensors(theirs: LlavaForConditionalGeneration, *, linear: bool) -> dict[str, Tensor]:
    """The decoder and projector of transformers' model under the names of reference facts 1.9 (a)."""
    state = theirs.state_dict()
    tensors = {
        n.replace("model.language_model.", "model."): t.clone()
        for n, t in state.items()
        if "language_model" in n or n.startswith("lm_head")
    }
    for number in (1, 2):
        for kind in ("weight", "bias"):
            layer = "" if linear else f"{2 * number - 2}."
            if number == 1 or not linear:
                tensors[f"model.mm_projector.{layer}{kind}"] = state[
                    f"model.multi_modal_projector.linear_{number}.{kind}"
                ].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    return tensors


def write_clip(theirs: LlavaForConditionalGeneration, directory: Path) -> Path:
    """The tower as transformers saves it."""
    tower = CLIPVisionModel(theirs.config.vision_config)
    tower.load_state_dict(theirs.model.vision_tower.state_dict())
    tower.save_pretrained(directory)
    return directory


def write_directory(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


def linear_reference() -> LlavaForConditionalGeneration:
    """transformers' LLaVA whose second projector layer does nothing."""
    theirs = reference(projector_hidden_act="linear")
    with torch.no_grad():
        theirs.model.multi_modal_projector.linear_2.weight.copy_(torch.eye(48))
        theirs.model.multi_modal_projector.linear_2.bias.zero_()
    return theirs


@pytest.fixture(scope="module")
def mlp() -> LlavaForConditionalGeneration:
    return reference()


@pytest.fixture(scope="module")
def clip(mlp: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(mlp, tmp_path_factory.mktemp("clip"))


@pytest.fixture
def v15(mlp: LlavaForConditionalGeneration, clip: Path, tmp_path: Path) -> Path:
    return write_directory(tmp_path / "v15", authors_tensors(mlp, linear=False), mm_vision_tower=str(clip), **MLP)


def test_v1_5(mlp: LlavaForConditionalGeneration, v15: Path) -> None:
    ours = load_model(v15)
    assert ours.config.image_token_id == IMAGE_SENTINEL
    assert (ours.config.projector, ours.config.image_aspect, ours.config.template) == ("mlp2x_gelu", "pad", "v1")
    assert_same_logits(ours, mlp)


def test_v1_linear(tmp_path: Path) -> None:
    theirs = linear_reference()
    clip = write_clip(theirs, tmp_path / "clip")
    directory = write_directory(tmp_path / "v1", authors_tensors(theirs, linear=True), mm_vision_tower=str(clip))
    ours = load_model(directory)
    assert (ours.config.projector, ours.config.image_aspect) == ("linear", "square")
    assert_same_logits(ours, theirs)


def test_tower_by_argument(mlp: LlavaForConditionalGeneration, clip: Path, v15: Path) -> None:
    edit_json(v15 / "config.json", mm_vision_tower="nowhere/to-be-found")
    assert_same_logits(load_model(v15, vision_tower=clip), mlp)


def test_tower_folder_inside_the_checkpoint(mlp: LlavaForConditionalGeneration, v15: Path) -> None:
    write_clip(mlp, v15 / "clip")
    edit_json(v15 / "config.json", mm_vision_tower="clip")
    assert_same_logits(load_model(v15), mlp)


def test_tower_inside_the_weights(mlp: LlavaForConditionalGeneration, v15: Path) -> None:
    tensors = load_file(v15 / "model.safetensors")
    inside = {
        f"model.vision_tower.vision_tower.vision_model.{n}": t.clone()
        for n, t in mlp.model.vision_tower.state_dict().items()
    }
    save_file(tensors | inside, v15 / "model.safetensors")
    edit_json(v15 / "config.json", mm_vision_tower="nowhere/to-be-found")
    ours = load_model(v15)
    assert {name: getattr(ours.config.vision, name) for name in VISION} == VISION
    assert_same_logits(ours, mlp)


def test_tower_that_cannot_be_had(v15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    edit_json(v15 / "config.json", mm_vision_tower="openai/clip-vit-nowhere")
    with pytest.raises(CheckpointError, match=r"openai/clip-vit-nowhere.*no network here.*vision_tower"):
        load_model(v15)


def test_tower_from_the_hub(v15: Path, clip: Path, mlp, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(clip))
    edit_json(v15 / "config.json", mm_vision_tower="openai/clip-vit-nowhere")
    assert_same_logits(load_model(v15), mlp)
    assert asked == ["openai/clip-vit-nowhere"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_delta(clip: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Delta and base made from a model, three marker rows more than the base has; sums are exact in their dtype."""
    theirs = linear_reference()
    target = {n: t.to(dtype) for n, t in authors_tensors(theirs, linear=True).items() if "inv_freq" not in n}
    generator = torch.Generator().manual_seed(1)
    base, delta = {}, {}
    for name, tensor in target.items():
        if "mm_projector" in name:
            delta[name] = tensor
            continue
        rows = len(tensor) - 3 if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
        base[name] = torch.randn(rows, *tensor.shape[1:], generator=generator).to(dtype)
        delta[name] = tensor.clone()
        delta[name][:rows] -= base[name]
    expected = {n: t.clone() for n, t in delta.items()}
    for name, tensor in base.items():
        expected[name][: len(tensor)] += tensor  # what apply_delta.py computes
    (tmp_path / "base").mkdir()
    torch.save(base, tmp_path / "base" / "pytorch_model.bin")
    directory = write_directory(
        tmp_path / "delta", delta, mm_vision_tower=str(clip), mm_use_im_start_end=True, torch_dtype=str(dtype)[6:]
    )
    ours = load_model(directory, base=tmp_path / "base")
    assert ours.dtype == dtype
    loaded = canonical_tensors(ours)
    for name, tensor in expected.items():
        if "mm_projector" not in name:
            assert torch.equal(loaded[f"language_model.{name}"], tensor), name
    assert torch.equal(ours.projector.linear_1.weight, target["model.mm_projector.weight"])
    assert ours.config.template == "v0"
    assert (ours.config.image_start_token_id, ours.config.image_end_token_id) == (94, 95)
    if dtype == torch.float32:
        assert_same_logits(ours, theirs)


def test_delta_with_the_wrong_base(clip: Path, v15: Path, tmp_path: Path) -> None:
    base = {n: t for n, t in load_file(v15 / "model.safetensors").items() if "mm_projector" not in n}
    base["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 48)
    del base["model.norm.weight"]
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(v15, base=tmp_path / "base")
    assert "model.norm.weight is not in the base" in str(caught.value)
    assert "up_proj.weight is (80, 48), in the base (64, 48)" in str(caught.value)


def test_markers_by_added_tokens(v15: Path) -> None:
    edit_json(v15 / "config.json", mm_use_im_start_end=True)
    (v15 / "added_tokens.json").write_text('{"<im_patch>": 90, "<im_start>": 91, "<im_end>": 92, "[PAD]": 93}')
    config = config_of(v15)
    assert (config.image_start_token_id, config.image_end_token_id) == (91, 92)


@pytest.mark.parametrize("linear", [True, False])
def test_written_and_read_back(v15: Path, mlp: LlavaForConditionalGeneration, tmp_path: Path, linear: bool) -> None:
    ours = load_model(v15)
    if linear:
        ours = lf.Llava(ours.config.replace(projector="linear", template="llava_v1"), seed=1)
    save_model(ours, tmp_path / "out", format="authors")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    expected = set(authors_tensors(mlp, linear=linear)) - {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert names == expected
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["mm_projector_type"] == ("linear" if linear else "mlp2x_gelu")
    assert {k: fields[k] for k in CONFIG if k.startswith("mm_")} == {
        k: v for k, v in CONFIG.items() if k.startswith("mm_")
    }
    (tmp_path / "out").rename(tmp_path / "moved")
    back = load_model(tmp_path / "moved")
    assert back.config == ours.config.replace(dtype="float32")
    assert torch.equal(our_logits(back), our_logits(ours))
    for name, weight in back.named_parameters():
        assert torch.equal(weight, ours.get_parameter(name))


def test_through_both_formats(v15: Path, mlp: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    save_model(load_model(v15), tmp_path / "hf")
    hub = load_model(tmp_path / "hf")
    save_model(hub, tmp_path / "authors", format="authors")
    back = load_model(tmp_path / "authors")
    assert back.config == hub.config
    assert torch.equal(our_logits(back), our_logits(hub))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "NeXT"),
        ({"mm_hidden_size": 1152}, "mm_hidden_size=1152"),
        ({"mm_vision_tower": None}, "neither holds a vision tower nor names one"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls'"),
    ],
)
def test_what_is_not_supported_is_refused(v15: Path, change: dict[str, Any], message: str) -> None:
    edit_json(v15 / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(v15)


def test_extra_arguments_for_a_whole_checkpoint(mlp: LlavaForConditionalGeneration, clip: Path, tmp_path: Path) -> None:
    mlp.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="vision_tower belongs to the authors' format"):
        load_model(tmp_path, vision_tower=clip)
