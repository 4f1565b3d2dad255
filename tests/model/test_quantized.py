"""Weight-only quantization: errors against rounding in numpy, logits against the same values as plain floats."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llava_fast as lf
from llava_fast.errors import ConfigError
from llava_fast.model.quantized import (
    GROUP,
    KINDS,
    VALUES_AT_ONCE,
    QuantizedLinear,
    quantization_of,
    quantize,
    quantized_layers,
)

TINY = lf.ModelConfig.preset("tiny")
GROUPED = TINY.replace(text=replace(TINY.text, num_key_value_heads=2, tie_word_embeddings=True))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two would wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def batch() -> lf.PackedBatch:
    """Two sequences, the first with an image."""
    ids = torch.tensor([1] + [4] * 9 + [7, 8, 9, 1, 10, 11, 12])
    labels = torch.where(ids.roll(-1) == 4, -100, ids.roll(-1))
    positions = torch.cat([torch.arange(13), torch.arange(4)]).int()
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return lf.PackedBatch(ids, labels, positions, torch.tensor([0, 13, 17]).int(), pixels, 4)


def made(config: lf.ModelConfig = TINY, dtype: torch.dtype = torch.float32) -> lf.Llava:
    """Weights large enough for every layer to matter to the logits."""
    model = lf.Llava(config, dtype=dtype, seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(3)
    return model


def layer_of(kind: str, weight: Tensor) -> QuantizedLinear:
    layer = QuantizedLinear(kind, weight.shape[1], weight.shape[0], "cpu")
    layer.quantize_rows(slice(0, len(weight)), weight)
    return layer


def dequantized(model: lf.Llava) -> lf.Llava:
    """A plain model with the values of the quantized one."""
    plain = lf.Llava(model.config, dtype=model.dtype, seed=None)
    values = {n: t for n, t in model.state_dict().items() if n in plain.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            values[f"{name}.weight"] = module.dequantize()
    plain.load_state_dict(values)
    return plain


@pytest.mark.parametrize("k", [352, 130])
def test_values_are_near_what_they_were(kind: str, k: int) -> None:
    weight = torch.randn(24, k, generator=torch.Generator().manual_seed(2)) / 40 + 0.003
    weight[5], weight[6] = 0, 0.25
    weight[7, 3] = 2.0
    w = weight.double().numpy()
    off = np.abs(layer_of(kind, weight).dequantize().double().numpy() - w)
    largest = np.abs(w).max(1, keepdims=True)
    assert off.any()
    if kind == "int8":  # half of one of 127 steps
        assert (off <= largest / 127 / 2 * (1 + 1e-5)).all()
    elif kind == "fp8":  # three bits behind the first; below 2**-6 of the scale in steps of 2**-9 of it
        assert (off <= np.maximum(np.abs(w) / 16, largest / 448 * 2**-10) * (1 + 1e-5)).all()
    else:  # ends of a range may be cut by 12% of it, and no more is lost by that than by 16 levels over all of it
        lost = allowed = 0.0
        for first in range(0, k, GROUP):
            group, error = w[:, first : first + GROUP], off[:, first : first + GROUP]
            low, span = group.min(1, keepdims=True), np.ptp(group, axis=1, keepdims=True)
            assert (error <= 0.125 * span + 2**-8 * 2 * largest).all()
            step = np.maximum(span, 1e-12) / 15
            simple = np.rint((group - low) / step) * step + low - group
            lost, allowed = lost + (error[:5] ** 2).sum(), allowed + (simple[:5] ** 2).sum()
        assert lost < allowed


def test_parts_give_the_same_as_the_whole(kind: str) -> None:
    """Query, key and value, or gate and up, may come one by one, in any order."""
    weight = torch.randn(3 * 40, 200).bfloat16()
    whole, parts = layer_of(kind, weight), QuantizedLinear(kind, 200, 120, "cpu")
    for start in (80, 0, 40):
        parts.quantize_rows(slice(start, start + 40), weight[start : start + 40])
    assert_same_buffers(whole, parts)


def test_few_rows_at_a_time_give_the_same_as_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 200)
    whole = layer_of(kind, weight)
    monkeypatch.setitem(VALUES_AT_ONCE, "cpu", 1500)
    assert_same_buffers(whole, layer_of(kind, weight))


def assert_same_buffers(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=["head", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_rounded_values(kind: str, config: lf.ModelConfig, dtype: torch.dtype) -> None:
    model = made(config, dtype)
    before = model.logits(batch()).float()
    quantize(model, kind)
    got, expected = model.logits(batch()), dequantized(model).logits(batch())
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)
    off = (got.float() - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert 1e-4 < off < {"int8": 0.03, "fp8": 0.15, "int4": 0.4}[kind]  # rounded, and no more than that


def test_which_layers_are_quantized(kind: str) -> None:
    model = made()
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert quantization_of(model) is None
    quantize(model, kind)
    assert quantization_of(model) == kind
    found = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert found == quantized_layers(model, kind)
    assert ("lm_head" in found) == (kind != "int4")
    assert len(found) == 4 * 4 + (kind != "int4")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, plain[name])
    n, k = 3 * 128, 128
    held = sum(t.nbytes for t in model.decoder.layers[0].qkv.buffers())
    assert held == {"int8": n * k + 4 * n, "fp8": n * k + 4 * n, "int4": n * k // 2 + 8 * n}[kind]


def test_tied_embeddings_stay(kind: str) -> None:
    model = made(GROUPED)
    quantize(model, kind)
    assert model.lm_head is None
    assert model.head_weight is model.decoder.embed_tokens


def test_generates(kind: str) -> None:
    model = made()
    quantize(model, kind)
    assert model.generate(batch(), max_new_tokens=5, stop_ids=()) == dequantized(model).generate(
        batch(), max_new_tokens=5, stop_ids=()
    )


def test_moves_and_casts_leave_the_codes(kind: str) -> None:
    model = made()
    quantize(model, kind)
    twin = copy.deepcopy(model)
    twin.to(torch.bfloat16).half().float()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert_same_buffers(module, twin.get_submodule(name))
    assert {t.device.type for t in twin.to("meta").buffers()} == {"meta"}


def test_state_dict(kind: str) -> None:
    model, other = made(), lf.Llava(TINY, seed=5)
    for one in (model, other):
        quantize(one, kind)
    assert not torch.equal(model.logits(batch()), other.logits(batch()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.logits(batch()), other.logits(batch()))


def test_loss_is_told_and_training_refused(kind: str) -> None:
    model = made()
    quantize(model, kind)
    torch.testing.assert_close(model.loss(batch()), dequantized(model).loss(batch()).detach(), atol=1e-4, rtol=0)
    assert not any(p.requires_grad for p in model.parameters())
    model.projector.requires_grad_(True)
    with pytest.raises(ConfigError, match=rf"quantized to {kind} is for inference.*quantization=None"):
        model.loss(batch())
    with torch.no_grad():
        assert model.loss(batch()).isfinite()


def test_unknown_kind_and_second_time() -> None:
    model = made()
    with pytest.raises(ConfigError, match=r"quantization='int3' is not known; choose one of int8, int4, fp8"):
        quantize(model, "int3")
    assert quantization_of(model) is None
    quantize(model, "int8")
    with pytest.raises(ConfigError, match="quantized to int8 already"):
        quantize(model, "int4")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_one_weight_at_a_time() -> None:
    """In place: at no time is there more than the model before and one layer."""
    program = """
import torch, llava_fast as lf
from dataclasses import replace
from llava_fast.model.quantized import quantize

def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

torch.set_num_threads(1)
text = replace(lf.ModelConfig.preset("tiny").text, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
               num_attention_heads=8, num_key_value_heads=8, head_dim=128)
quantize(lf.Llava(lf.ModelConfig.preset("tiny")), "int4")
model = lf.Llava(lf.ModelConfig.preset("tiny").replace(text=text), dtype=torch.bfloat16, seed=None)
for weight in model.parameters():
    weight.data.fill_(0.5)
size = sum(p.nbytes for p in model.parameters())
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
quantize(model, "int4")
print((kilobytes("VmHWM") - before) * 1024, (kilobytes("VmRSS") - before) * 1024, size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak, after, size = map(int, done.stdout.split())
    print(f"peak {peak / 1e6:.0f} MB, after {after / 1e6:.0f} MB, of {size / 1e6:.0f} MB")
    assert peak < 0.3 * size
    assert after < -0.5 * size
