"""Training with float8 products: stage 1 by the frozen decoder's, stage 2 by torchao's, multiplied in float32 here."""

from __future__ import annotations

import pytest
import torch

from llava_fast.data.scenes import Scenes
from llava_fast.errors import ConfigError
from llava_fast.model import fp8
from llava_fast.model.decoder import DecoderLayer
from llava_fast.train import memory
from llava_fast.train.__main__ import main
from llava_fast.train.demo import PARTS
from llava_fast.train.recipe import recipe
from llava_fast.train.stages import freeze
from tests.train.conftest import losses


def gradients(model, batch) -> dict[str, torch.Tensor]:
    freeze(model, 1)
    model.zero_grad()
    model.loss(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_stage1_learns_what_it_learns_without(trainer, tmp_path):
    """24 steps, loss by loss; and it is not the same arithmetic."""
    for name in ("plain", "float8"):
        run = trainer(out=name, epochs=6, lr=2e-3, fp8_frozen=name == "float8")
        run.model.init_weights(1)
        if name == "float8":
            fp8.freeze_decoder(run.model)
        run.run()
    plain, float8 = losses(tmp_path / "plain"), losses(tmp_path / "float8")
    assert len(plain) == 24
    assert float8 == pytest.approx(plain, rel=0.01)
    assert float8 != pytest.approx(plain, rel=1e-6)
    assert plain[-1] < 0.99 * plain[0]


def test_projectors_gradient_has_the_error_of_the_rounding(small):
    """Beside float32; the bound is from rounding every product's operands to 4 significant bits in another way."""
    model, processor = small
    batch = processor.pack([Scenes(4, 3)[i] for i in range(4)])
    exact = gradients(model, batch)
    simulated = gradients(simulate(model), batch)
    restore(model)
    fp8.freeze_decoder(model)
    mine = gradients(model, batch)
    assert set(mine) == {"projector.linear_1.weight", "projector.linear_1.bias"}
    for name in exact:
        error, allowed = ((a[name] - exact[name]).norm() / exact[name].norm() for a in (mine, simulated))
        assert 0 < error < 2 * allowed < 0.5, name


def simulate(model):
    """Every product of the layers with its operands rounded in float32, by multiplying and dividing."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return four_bits(x) @ four_bits(weight).t()

        @staticmethod
        def backward(ctx, dy):
            (weight,) = ctx.saved_tensors
            return four_bits(dy) @ four_bits(weight), None

    for layer in model.decoder.layers:
        for name in ("qkv", "out", "gate_up", "down"):
            product = getattr(layer, name)
            product.forward = lambda x, product=product: Product.apply(x, product.weight)
    return model


def restore(model):
    for layer in model.decoder.layers:
        for name in ("qkv", "out", "gate_up", "down"):
            del getattr(layer, name).forward


def four_bits(x):
    mantissa, exponent = torch.frexp(x.detach())
    return torch.ldexp(torch.round(mantissa * 16) / 16, exponent)


def test_checkpointing_changes_nothing(trainer, small):
    found = []
    for kind in ("none", "selective", "full"):
        model, _ = small
        run = trainer(out=kind, activation_checkpointing=kind, fp8_frozen=True)
        if kind == "none":
            fp8.freeze_decoder(model)
        model.projector.linear_1.weight.data.fill_(0.01)
        model.projector.linear_1.bias.data.zero_()
        found.append(run.run()["losses"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_memory_counts_the_codes_twice(small):
    model, _ = small
    freeze(model, 1)
    products = sum(p.numel() for n, p in model.named_parameters() if n.startswith("decoder.layers") and p.dim() == 2)
    outputs = sum(p.shape[0] for n, p in model.named_parameters() if n.startswith("decoder.layers") and p.dim() == 2)
    options = {"stage": 1, "tokens": 200, "supervised": 50, "images": 1, "dtype": torch.bfloat16}
    before = memory.estimate(model, **options)
    fp8.freeze_decoder(model)
    after = memory.estimate(model, **options)
    assert before.weights == 2 * sum(p.numel() for p in model.parameters()) + 2 * products
    assert after.weights - before.weights == 4 * outputs  # two bytes a weight, as before, and the scales
    assert isinstance(model.decoder.layers[0], DecoderLayer)


def test_sizes_that_do_not_fit_are_named(small):
    model, _ = small
    model.decoder.layers[0].down.weight = torch.nn.Parameter(torch.zeros(40, 24), requires_grad=False)
    with pytest.raises(ConfigError, match=r"--fp8-frozen: down: .*\(40, 24\).*multiples of 16"):
        fp8.freeze_decoder(model)


# ---- stage 2, by torchao


def test_stage2_learns_what_it_learns_without(trainer, tmp_path):
    pytest.importorskip("torchao")
    for name in ("plain", "float8"):
        run = trainer(out=name, stage=2, epochs=5, lr=1e-3)
        run.model.init_weights(1)
        if name == "float8":
            fp8.train_decoder(run.model, emulate=True)
        run.run()
    plain, float8 = losses(tmp_path / "plain"), losses(tmp_path / "float8")
    assert len(plain) == 20
    assert float8 == pytest.approx(plain, rel=0.03)
    assert float8 != pytest.approx(plain, rel=1e-6)
    assert plain[-1] < 0.6 * plain[0]
    kinds = {type(m).__name__ for m in run.model.decoder.layers.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {"Float8Linear"}
    assert type(run.model.lm_head).__name__ == "Linear"


# ---- what is refused, in one line and before any work

START = ["--preset", "tiny", "--tokenizer", str(PARTS / "decoder"), "--device", "cpu"]


def test_without_a_card(tmp_path, scenes_folder, capsys):
    data = ["--data", str(scenes_folder / "scenes.json"), "--images", str(scenes_folder), "--out", str(tmp_path / "r")]
    assert main([*START, *data, "--stage", "2", "--fp8"]) == 1
    said = capsys.readouterr().err.strip()
    assert "--fp8 needs a CUDA device with float8 products, and this run is on cpu" in said
    assert "\n" not in said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("check, option", [(fp8.check_frozen, "--fp8-frozen"), (fp8.check_trained, "--fp8")])
def test_cards_without_float8_and_other_dtypes(check, option, monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(ConfigError, match=rf"^{option} needs .*sm_89 and later.*this run is on NVIDIA A100-SXM4-80GB"):
        check(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=rf"^{option} needs --dtype bfloat16, and this run computes in torch.float32"):
        check(cuda, torch.float32)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"stage": 2, "fp8_frozen": True}, "--fp8-frozen is of stage 1.*stage 2 has --fp8"),
        ({"stage": 1, "fp8_frozen": True, "shard_frozen": True}, "--shard-frozen would share it out"),
        ({"stage": 1, "fp8": True}, "--fp8 trains the whole decoder in stage 2"),
        ({"stage": 2, "fp8": True, "lora_rank": 4}, "LoRA has neither"),
    ],
)
def test_what_does_not_go_together(changes, says):
    with pytest.raises(ConfigError, match=says):
        recipe("paper-stage2" if changes["stage"] == 2 else "paper-stage1", **changes)
