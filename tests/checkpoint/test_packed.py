"""Quantized directories: the files' content decoded by numpy, round trips to the bit, what other software writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.checkpoint import join, load_model, save_clip, save_llama, save_model, save_projector
from llava_fast.checkpoint.packed import for_kernels, in_order
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.model.quantized import KINDS, QuantizedLinear, quantization_of, quantize
from llava_fast.processor import Processor, Tokenizer
from tests.checkpoint.helpers import assert_same_logits, edit_json, our_logits, reference
from tests.realdata import real_data

ODD = {"hidden_size": 52, "intermediate_size": 150, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
Q = "language_model.model.layers.1.self_attn.q_proj."
HEAD = "language_model.lm_head."


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of transformers', with grouped heads and widths that fill neither words nor blocks."""
    directory = tmp_path_factory.mktemp("plain")
    reference(text=ODD).save_pretrained(directory)
    return directory


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_bit_equal(a: lf.Llava, b: lf.Llava) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def decoded(kind: str, tensors: dict[str, Tensor], name: str, k: int) -> np.ndarray:
    """A weight's values (N, K) by the formulas in the module's docstring."""
    numbers = {
        part: tensors[f"{name}{part}"].float().numpy().astype(np.float64)
        for part in ("weight_scale", "weight_offset", "weight_channel")
        if f"{name}{part}" in tensors
    }
    if kind == "fp8":
        return tensors[f"{name}weight"].float().numpy() * numbers["weight_scale"]
    words = tensors[f"{name}weight_packed"].numpy().view(np.uint32)
    width = 8 if kind == "int8" else 4
    index = np.arange(k)
    codes = (words[:, index * width // 32] >> (index * width % 32).astype(np.uint32)) & (2**width - 1)
    if kind == "int8":
        return numbers["weight_scale"] * (codes.astype(np.float64) - 128)
    scale, offset = (numbers[part][:, index // 128] for part in ("weight_scale", "weight_offset"))
    return numbers["weight_channel"] * (scale * codes + offset)


def test_files_hold_what_the_docstring_says(kind: str, plain: Path, tmp_path: Path) -> None:
    model = load_model(plain, quantization=kind)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = model.decoder.layers[1]
    for name, module, rows in (
        (Q, layer.qkv, slice(0, 24)),
        (Q.replace("q_proj", "v_proj"), layer.qkv, slice(36, 48)),
        (Q.replace("self_attn.q_proj", "mlp.up_proj"), layer.gate_up, slice(150, 300)),
        (Q.replace("self_attn.q_proj", "mlp.down_proj"), layer.down, slice(0, 52)),
    ):
        assert isinstance(module, QuantizedLinear)
        values = decoded(kind, tensors, name, module.in_features)
        np.testing.assert_allclose(values, module.dequantize()[rows].numpy(), rtol=1e-6, atol=0)
    shapes = {n.removeprefix(Q): (tuple(t.shape), t.dtype) for n, t in tensors.items() if n.startswith(Q)}
    assert (
        shapes
        == {
            "int8": {
                "weight_packed": ((24, 13), torch.int32),
                "weight_scale": ((24, 1), torch.float32),
                "weight_shape": ((2,), torch.int64),
            },
            "int4": {
                "weight_packed": ((24, 7), torch.int32),
                "weight_scale": ((24, 1), torch.bfloat16),
                "weight_offset": ((24, 1), torch.bfloat16),
                "weight_channel": ((24, 1), torch.float32),
            },
            "fp8": {"weight": ((24, 52), torch.float8_e4m3fn), "weight_scale": ((24, 1), torch.float32)},
        }[kind]
    )
    if kind == "int8":
        assert tensors[f"{Q}weight_shape"].tolist() == [24, 52]
    assert (f"{HEAD}weight_scale" in tensors) == (kind != "int4")
    assert not [f for f in tmp_path.iterdir() if f.suffix not in (".json", ".safetensors")]


@pytest.mark.parametrize("k", [1, 3, 4, 127, 128, 129, 300])
def test_orders_are_inverse(kind: str, k: int) -> None:
    layer = QuantizedLinear(kind, k, 5, "cpu")
    layer.quantize_rows(slice(0, 5), torch.randn(5, k, generator=torch.Generator().manual_seed(k)))
    laid_out = layer.codes if kind == "fp8" else layer.words
    assert isinstance(laid_out, Tensor)
    back = for_kernels(kind, in_order(kind, laid_out, k), k)
    assert back.dtype == laid_out.dtype
    assert torch.equal(bits(back), bits(laid_out))


@pytest.mark.parametrize("text", [ODD, ODD | {"tie_word_embeddings": True}], ids=["head", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(kind: str, tmp_path: Path, text: dict[str, Any], dtype: torch.dtype) -> None:
    reference(text=text).to(dtype).save_pretrained(tmp_path / "plain")
    model = load_model(tmp_path / "plain", quantization=kind)
    assert quantization_of(model) == kind
    assert model.dtype == dtype
    save_model(model, tmp_path / "quantized", shard_bytes=20_000)
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 3
    back = load_model(tmp_path / "quantized")
    assert_bit_equal(back, model)
    assert torch.equal(our_logits(back), our_logits(model))
    assert not any(p.requires_grad for p in back.parameters())
    assert_bit_equal(load_model(tmp_path / "quantized", quantization=kind), model)


@pytest.mark.parametrize("format", ["hf", "authors"])
def test_rounded_on_the_way_is_rounded_in_memory(kind: str, plain: Path, tmp_path: Path, format: str) -> None:
    whole = load_model(plain)
    save_model(whole, tmp_path, format=format, shard_bytes=30_000)  # parts of a merged weight in different files
    quantize(whole, kind)
    assert_bit_equal(load_model(tmp_path, quantization=kind), whole)


def test_rounded_from_the_precision_of_the_file(plain: Path) -> None:
    """Not from bfloat16 where the file has float32."""
    exact, model = load_model(plain), load_model(plain, quantization="int8", dtype=torch.bfloat16)
    quantize(exact, "int8")
    assert model.dtype == torch.bfloat16
    ours, theirs = model.decoder.layers[0].qkv, exact.decoder.layers[0].qkv
    assert torch.equal(ours.words, theirs.words)  # type: ignore[arg-type]


def test_head_without_quantization_stays_so(kind: str, plain: Path, tmp_path: Path) -> None:
    """As most published directories have it."""
    model = load_model(plain, quantization=kind)
    head = load_model(plain).lm_head
    model.lm_head = head
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert isinstance(back.lm_head, nn.Linear) and head is not None
    assert torch.equal(back.lm_head.weight, head.weight)
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert kind == "int4" or "re:.*lm_head.*" in fields["ignore"]


def test_vocabulary_that_grows(kind: str, plain: Path, tmp_path: Path) -> None:
    """The image token's row, and those that fill up, are the mean of the rounded ones."""
    model = load_model(plain, quantization=kind)
    model.config = model.config.replace(image_token_id=-200)
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert back.config.text.vocab_size == 128
    old, new = model.head_weight.detach(), back.head_weight.detach()
    assert torch.equal(new[:96], old)
    mean = old.mean(0)
    torch.testing.assert_close(new[96:], mean.expand(32, -1), atol=mean.abs().max().item() / 8, rtol=0)
    torch.testing.assert_close(
        back.decoder.embed_tokens[96:], model.decoder.embed_tokens.mean(0).expand(32, -1), atol=1e-6, rtol=0
    )


def test_another_kind_than_the_directory_s(plain: Path, tmp_path: Path) -> None:
    save_model(load_model(plain, quantization="int8"), tmp_path)
    with pytest.raises(ConfigError, match=r"quantization='fp8': the weights of .* are int8 already; leave it None"):
        load_model(tmp_path, quantization="fp8")


def test_unknown_kind_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization='q4_0' is not known; choose one of int8, int4, fp8"):
        load_model(tmp_path / "none", quantization="q4_0")


INT4_GROUPS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}},
    },
}


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "quant_method='awq'"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
        ({"load_in_4bit": True}, "quant_method=None"),
        (INT4_GROUPS, r"quant_method='compressed-tensors', format='pack-quantized'"),
        ({"quant_method": "llava_fast", "format": "int4-offset", "group_size": 64}, "quant_method='llava_fast'"),
    ],
)
@pytest.mark.parametrize("format", ["hf", "authors"])
def test_other_software_s_forms_are_refused(
    plain: Path, tmp_path: Path, told: dict[str, Any], named: str, format: str
) -> None:
    save_model(load_model(plain), tmp_path, format=format)
    edit_json(tmp_path / "config.json", quantization_config=told)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}.* without quantization.*quantization='int8'"):
        load_model(tmp_path)


def test_8_bits_as_other_software_writes_them(plain: Path, tmp_path: Path) -> None:
    """Scales in 16 bits, activations rounded on the fly, a plain head, more fields in the config, other names."""
    model = load_model(plain, quantization="fp8")
    model.lm_head = load_model(plain).lm_head
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {n: t.bfloat16() if n.endswith("_scale") else t for n, t in load_file(file).items()}
    renamed = {n.replace("language_model.model.", "model.language_model."): t for n, t in tensors.items()}
    save_file({n.replace("language_model.lm_head", "lm_head"): t for n, t in renamed.items()}, file)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    told["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    told["config_groups"]["group_0"]["weights"] |= {"observer": "minmax", "actorder": None}
    edit_json(tmp_path / "config.json", quantization_config=told | {"kv_cache_scheme": None, "version": "0.9"})
    back = load_model(tmp_path)
    assert isinstance(back.lm_head, nn.Linear)
    for ours, theirs in zip(back.decoder.layers, model.decoder.layers, strict=True):
        assert torch.equal(bits(ours.gate_up.codes), bits(theirs.gate_up.codes))
        assert torch.equal(ours.gate_up.scale, theirs.gate_up.scale.bfloat16().float())


def test_faults_are_listed(plain: Path, tmp_path: Path) -> None:
    save_model(load_model(plain, quantization="int8"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{Q}weight_packed"]
    tensors[f"{HEAD}weight_packed"] = tensors[f"{HEAD}weight_packed"].float()
    tensors[f"{Q}weight_zero_point"] = torch.zeros(3, 1, dtype=torch.int32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert f"1 missing: {Q}weight_packed" in message
    assert f"1 unexpected: {Q}weight_zero_point" in message
    assert f"dtype that does not fit: {HEAD}weight_packed is torch.float32" in message


def test_codes_without_a_word_in_the_config(plain: Path, tmp_path: Path) -> None:
    """float8 alone is no weight: its scales would be lost."""
    save_model(load_model(plain), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}weight"] = tensors[f"{Q}weight"].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"dtype that does not fit: .*q_proj.weight is torch.float8_e4m3fn"):
        load_model(tmp_path)


def test_other_formats_are_refused_and_parts_still_written(plain: Path, tmp_path: Path) -> None:
    model = load_model(plain, quantization="int8")
    for write in (lambda d: save_model(model, d, format="authors"), lambda d: save_llama(model, d)):
        with pytest.raises(ConfigError, match=r"quantized to int8.*format='hf' alone"):
            write(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    save_clip(model, tmp_path / "clip")
    save_projector(model, tmp_path)
    save_llama(load_model(plain), tmp_path / "llama")
    joined = join(tmp_path / "clip", tmp_path / "llama", projector="mlp2x_gelu", projector_weights=tmp_path)
    quantize(joined, "int8")
    assert_bit_equal(joined, model)


def test_with_its_processor(kind: str, plain: Path, tmp_path: Path) -> None:
    """llava_fast.load and save: nothing is said of quantization the second time."""
    tokenizer = Tokenizer.load(real_data("tokenizer", "llama2_tokenizer.model"))
    config = load_model(plain).config
    config = config.replace(text=replace(config.text, vocab_size=32064), image_token_id=32000)
    lf.save(lf.Llava(config, seed=0), Processor.from_config(config, tokenizer), tmp_path / "plain")
    model, processor = lf.load(tmp_path / "plain", quantization=kind)
    lf.save(model, processor, tmp_path / "quantized")
    back, again = lf.load(tmp_path / "quantized")
    assert quantization_of(back) == kind
    assert_bit_equal(back, model)
    assert again.tokenizer.vocab_size == processor.tokenizer.vocab_size
    with pytest.raises(ConfigError, match="choose one of int8, int4, fp8"):
        lf.load(tmp_path / "plain", quantization="int2")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("head", [True, False])
def test_compressed_tensors_reads_it(plain: Path, tmp_path: Path, kind: str, head: bool) -> None:
    """transformers with the package compressed-tensors, where that is installed."""
    pytest.importorskip("compressed_tensors")
    model = load_model(plain, quantization=kind)
    if not head:
        model.lm_head = load_model(plain).lm_head
    save_model(model, tmp_path)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert_same_logits(model, theirs.eval())
