"""The adapted product against the formula in plain autograd; the 4-bit base against bitsandbytes' own layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import llava_fast as lf
from llava_fast.errors import ConfigError
from llava_fast.model.decoder import projections
from llava_fast.model.linear import Linear
from llava_fast.model.lora import TARGETS, LoraConfig, LoraLinear, attach, lora_of, merge
from llava_fast.model.nf4 import Nf4Linear, check_available, quantize_base

ROWS = {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}


def product(chosen: tuple[str, ...], dtype: torch.dtype = torch.float64, **fields: float) -> LoraLinear:
    torch.manual_seed(0)
    base = Linear(64, 64, bias=False, dtype=dtype)
    pieces = {name: ROWS[name] for name in chosen}
    layer = LoraLinear(base, pieces, LoraConfig(**({"rank": 3, "alpha": 5.0} | fields)), dtype)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def formula(layer: LoraLinear, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Each piece by itself, as in the paper; concatenated, with nothing added where there is no adapter."""
    y = x @ layer.base.weight.T
    parts = {name: layer.config.scale * (seen @ a.T) @ b.T for name, _, a, b in layer.pieces()}
    return y + torch.cat([parts.get(name, torch.zeros_like(y[:, rows])) for name, rows in ROWS.items()], dim=1)


@pytest.mark.parametrize("chosen", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj"), ("k_proj",)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_forward_and_gradients(chosen: tuple[str, ...], dropout: float) -> None:
    layer = product(chosen, dropout=dropout)
    x, dy = torch.randn(9, 64, dtype=torch.float64, requires_grad=True), torch.randn(9, 64, dtype=torch.float64)
    torch.manual_seed(1)
    y = layer(x)
    y.backward(dy)
    found = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    assert layer.base.weight.grad is None
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    torch.manual_seed(1)
    expected = formula(layer, x, F.dropout(x, dropout))
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    for a, b in zip(found, (x.grad, layer.lora_A.grad, layer.lora_B.grad), strict=True):
        torch.testing.assert_close(a, b)


def test_no_dropout_without_gradients_or_in_evaluation() -> None:
    layer = product(("q_proj",), dropout=0.5)
    x = torch.randn(4, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), formula(layer, x, x))
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x, x))


def test_compiled_blocks_have_the_same_gradients() -> None:
    layer = product(("q_proj", "v_proj"))
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for a, b in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_attach_and_merge_by_name() -> None:
    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, LoraConfig(rank=2, alpha=4, targets=("o_proj", "up_proj")))
    assert {n.split(".", 3)[3] for n, _ in model.named_parameters() if "lora_" in n} == {
        "out.lora_A",
        "out.lora_B",
        "gate_up.lora_A",
        "gate_up.lora_B",
    }
    assert lora_of(model).targets == ("o_proj", "up_proj")
    first = model.decoder.layers[0]
    assert first.gate_up.lora_B.shape == (352, 2)
    with torch.no_grad():
        first.gate_up.lora_B.fill_(1.0)
    update = 2.0 * first.gate_up.lora_B @ first.gate_up.lora_A
    merge(model)
    assert lora_of(model) is None
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed == ["decoder.layers.0.gate_up.weight"]
    gate, up = (after[changed[0]] - before[changed[0]]).chunk(2)
    assert not gate.any()
    torch.testing.assert_close(up, update, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": ("q_proj", "query")}, "choose some of q_proj"),
        ({"targets": ()}, "choose some of"),
    ],
)
def test_configs_that_cannot_work(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**({"rank": 1, "alpha": 1.0} | fields))


def test_not_on_weights_for_inference() -> None:
    from llava_fast.model.quantized import quantize

    model = lf.Llava(lf.ModelConfig.preset("tiny"))
    quantize(model, "int8")
    with pytest.raises(ConfigError, match="QuantizedLinear, which has no backward pass"):
        attach(model, LoraConfig(rank=1, alpha=1))


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def test_four_bits_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"needs a CUDA device, and this run is on cpu; leave out --lora-bits"):
        check_available(torch.device("cpu"))


@pytest.fixture
def four_bits() -> lf.Llava:
    """bitsandbytes computes the same on a CPU, slowly: enough for the arithmetic."""
    pytest.importorskip("bitsandbytes")
    model = lf.Llava(lf.ModelConfig.preset("tiny"), seed=3)
    quantize_base(model, torch.device("cpu"))
    return model


def test_codes_are_those_of_bitsandbytes_own_layer(four_bits: lf.Llava) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    plain = lf.Llava(four_bits.config, seed=3)
    for name, pieces in projections(plain.config.text).items():
        layer = getattr(four_bits.decoder.layers[1], name)
        weight = getattr(plain.decoder.layers[1], name).weight
        for rows in pieces.values():
            theirs = bnb.nn.Linear4bit(weight.shape[1], 1, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            theirs.weight = bnb.nn.Params4bit(weight[rows].detach().clone(), requires_grad=False, quant_type="nf4")
            theirs.to("cpu")
            x = torch.randn(3, weight.shape[1])
            torch.testing.assert_close(x @ layer.matrix()[rows].T, theirs(x), atol=1e-5, rtol=1e-4)
    assert isinstance(layer, Nf4Linear)
    assert 0.02 < (layer.matrix() - weight).norm() / weight.norm() < 0.12  # 4 bits, not more and not noise


def test_gradients_through_four_bits(four_bits: lf.Llava) -> None:
    """The same as on a plain base with the weights that the codes expand to."""
    plain = lf.Llava(four_bits.config, seed=3)
    with torch.no_grad():
        for mine, theirs in zip(plain.decoder.layers, four_bits.decoder.layers, strict=True):
            for name in projections(plain.config.text):
                getattr(mine, name).weight.copy_(getattr(theirs, name).matrix())
    grads = []
    ids = torch.randint(5, 600, (12,))
    batch = lf.PackedBatch(
        input_ids=ids,
        labels=ids.roll(-1),
        position_ids=torch.arange(12, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 12], dtype=torch.int32),
        pixel_values=torch.zeros(0, 3, 48, 48),
        image_token_id=4,
    )
    for model in (plain, four_bits):
        attach(model, LoraConfig(rank=4, alpha=8, targets=TARGETS[:4]), seed=1)  # gate_up and down have none
        for layer in model.decoder.layers:
            torch.nn.init.normal_(layer.qkv.lora_B, generator=torch.Generator().manual_seed(2))
        model.loss(batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and "lora_" in n})
    assert list(grads[0]) == list(grads[1])
    assert len(grads[0]) == 2 * 2 * 4
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="cannot be merged into it"):
        merge(four_bits)


def test_dtype_of_adapters_is_the_models() -> None:
    model = lf.Llava(dataclasses.replace(lf.ModelConfig.preset("tiny")), dtype=torch.bfloat16)
    attach(model, LoraConfig(rank=1, alpha=1))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
