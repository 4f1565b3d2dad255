"""The optimizer step: no wait for the device between two log lines, what is left out, compiling, memory, profile."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch._dynamo.utils
from torch.utils._python_dispatch import TorchDispatchMode

import llava_fast as lf
from llava_fast.data.scenes import Scenes
from llava_fast.errors import ConfigError
from llava_fast.model.lora import LoraConfig, attach
from llava_fast.train import memory
from llava_fast.train.distributed import empty_batch
from llava_fast.train.flops import sample_flops, step_flops
from llava_fast.train.profile import group_of, union
from llava_fast.train.recipe import recipe
from llava_fast.train.stages import freeze
from tests.train.ranks import make_trainer

# Ops that read a value of a tensor, or need one to know the shape of what they give: a GPU would have to be waited for.
WAITING = (
    *("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal."),
    *("aten.is_nonzero", "aten._unique", "aten.bincount", "aten.repeat_interleave.Tensor", "aten.index.Tensor_hacked"),
)


class Watch(TorchDispatchMode):
    """Notes every op, and every one that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.ops, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.ops.append(name)
        masks = name.startswith(("aten.index.", "aten.index_put")) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        # From one device to another. Backward passes name the device that the tensor is on already.
        to = (kwargs or {}).get("device") if name.startswith(("aten._to_copy", "aten.to.")) else None
        to_host = to is not None and torch.device(to) != args[0].device
        if name.startswith(WAITING) or masks or to_host:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits():
    x = torch.arange(4.0)
    for work in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.to("meta"),
        lambda: float(x[0]),
    ):
        with Watch() as watch:
            work()
        assert watch.waits


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("checkpointing", "dtype"),
    [("none", "float32"), ("selective", "float32"), ("full", "float32"), ("none", "bfloat16")],
)
def test_no_op_between_two_log_lines_waits_for_the_device(tmp_path, stage, checkpointing, dtype):
    """Steps of several passes, with pictures and without; in bfloat16 also the float32 sums and masters."""
    run = make_trainer(tmp_path, None, out="run", stage=stage, activation_checkpointing=checkpointing, max_tokens=400)
    run.dtype = getattr(torch, dtype)
    run.model.to(run.dtype)
    run.prepare()
    steps = [batches for _, (batches, _) in zip(range(3), run.load(), strict=False)]
    with Watch() as watch:
        for batches in steps:
            run.train_step(batches, total=20)
            run.step += 1
    assert watch.waits == []
    assert max(len(batches) for batches in steps) > 1 and any(b.num_images for batches in steps for b in batches)
    assert {"aten._fused_adamw_.default", "aten.mm.default", "aten._foreach_norm.Scalar"} <= set(watch.ops)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", [1, 2])
def test_no_wait_for_a_gpu_between_two_log_lines(tmp_path, stage):
    run = make_trainer(tmp_path, None, out="run", stage=stage)
    run.model.to("cuda", torch.bfloat16)
    run.dtype = torch.bfloat16
    run.prepare()
    steps = [batches for _, (batches, _) in zip(range(6), run.load(), strict=False)]
    for batches in steps[:2]:  # what compiles or allocates for the first time
        run.train_step(batches, total=20)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [run.train_step(batches, total=20) for batches in steps[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(r.loss) for r in results)


def test_last_layer_and_head_are_computed_for_supervised_rows_alone(small):
    """Equal to the loss from the logits of all rows; and the products' rows, counted."""
    model, processor = small
    batch = processor.pack([Scenes(4, 3)[i] for i in range(4)])
    every = torch.nn.functional.cross_entropy(model.logits(batch), batch.labels, ignore_index=-100)
    rows = []
    for layer in model.decoder.layers:
        layer.gate_up.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    torch.testing.assert_close(model.loss(batch), every)
    assert rows == [batch.num_tokens, batch.num_supervised]
    assert batch.num_supervised < batch.num_tokens / 2


def test_stage1_builds_no_gradient_of_the_decoder(small):
    """No product in the backward pass has a decoder weight's shape as its result."""
    model, processor = small
    freeze(model, 1)
    batch = processor.pack([Scenes(4, 3)[i] for i in range(4)])
    made = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if str(func).startswith("aten.mm"):
                made.append(tuple(out.shape))
            return out

    loss = model.loss(batch)
    with Shapes():
        loss.backward()
    weights = {tuple(p.shape) for p in model.decoder.parameters() if p.dim() == 2}
    projector = tuple(model.projector.linear_1.weight.shape)  # also the shape of a decoder weight: one is made, no more
    assert made.count(projector) == 1
    assert not set(made) - {projector} & (weights | {shape[::-1] for shape in weights})


def test_a_bin_without_samples_leaves_zero_gradients_everywhere(small):
    model, _ = small
    freeze(model, 2)
    loss = model.loss(empty_batch(model.config), denominator=7)
    loss.backward()
    assert loss.item() == 0
    for name, param in model.named_parameters():
        if param.requires_grad:  # present, so that every rank takes part in every sum
            assert param.grad is not None and not param.grad.any(), name


def test_compiled_layers_compute_the_same_and_share_their_code(tiny_pair, monkeypatch):
    """Twelve layers and three numbers of tokens: traced a few times in all; not by inductor here."""
    compiled, plain = tiny_pair
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_(self, backend="aot_eager", **kw))
    compiled.decoder.compile_layers()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens in (60, 77, 101):
        batch = memory.bin_of(plain.config, tokens, 20, 1)
        batch.labels[tokens - 20 :] = 3
        for model in tiny_pair:
            model.zero_grad()
            model.loss(batch).backward()
        torch.testing.assert_close(compiled.loss(batch), plain.loss(batch))
        for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    # Two halves of a layer, with and without an update before it and rows to end with: far fewer than layers x lengths.
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12


@pytest.fixture
def tiny_pair():
    tiny = lf.ModelConfig.preset("tiny")
    config = tiny.replace(text=dataclasses.replace(tiny.text, num_hidden_layers=12))
    models = lf.Llava(config, seed=0), lf.Llava(config, seed=0)
    for model in models:
        freeze(model, 2)
    return models


def test_compiling_and_selective_checkpointing_do_not_go_together():
    with pytest.raises(ConfigError, match=r"'selective' do not go together.*choose none or full"):
        recipe("paper-stage2", compile=True, activation_checkpointing="selective")


def test_profile_writes_a_trace_and_a_page(tmp_path):
    run = make_trainer(tmp_path, None, out="run", stage=2, profile=True)
    run.run()
    page = (run.out / "profile.txt").read_text()
    shares = {line[:24].strip(): float(line.split()[-1][:-1]) for line in page.splitlines()[2:8]}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert shares["matrix products"] > 5
    assert (run.out / "trace.json").stat().st_size > 1000


def test_kernels_are_told_apart():
    names = {
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication",
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matrix products",
        "_swiglu_forward_kernel": "memory-bound and other",
    }
    assert {name: group_of(name) for name in names} == names
    assert union([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4


def test_other_ways_to_save_memory_may_change_between_starts(tmp_path):
    make_trainer(tmp_path, None, out="run").run()
    make_trainer(tmp_path, None, out="run", activation_checkpointing="full", profile=True).run()
    make_trainer(tmp_path, None, out="run", feature_cache=str(tmp_path / "cache")).run()


# ---- operations and memory


def test_flops_of_a_batch_are_those_of_its_samples(small):
    model, processor = small
    batches = [processor.pack([Scenes(4, 3)[i]]) for i in range(4)]
    whole = processor.pack([Scenes(4, 3)[i] for i in range(4)])
    for train in (False, True):
        assert step_flops(model.config, whole, train) == pytest.approx(
            sum(step_flops(model.config, batch, train) for batch in batches)
        )


def test_flops_are_the_products_counted_by_torch(small):
    """Beside torch's own counter, for a batch of text; it counts attention in full, we the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = small
    freeze(model, 2)
    config, n, supervised = model.config, 300, 60
    batch = memory.bin_of(config, n, supervised, 0)
    batch.labels[n - supervised :] = 3
    with FlopCounterMode(display=False) as counter:
        model.loss(batch, denominator=1).backward()
    products = sum(v for k, v in counter.get_flop_counts()["Global"].items() if str(k) in ("aten.mm", "aten.addmm"))
    text = config.text
    attention = 6 * text.num_attention_heads * text.head_dim * n * n * text.num_hidden_layers
    sizes = torch.tensor([[n, supervised, 0]]).numpy()
    assert sample_flops(config, sizes, True)[0] - attention == pytest.approx(products, rel=0.01)


def test_live_counts_storages_and_not_views():
    known = torch.zeros(10)
    with memory.Live([known]) as live:
        a = torch.zeros(100)  # 400 bytes
        b = a[:50].view(5, 10) + known  # 200 more; the view none
        known.add_(1)
        del a
        c = torch.ones(25)  # 100 bytes, in the place of the 400
    assert live.peak == 600
    assert live.now == b.nbytes + c.nbytes == 300


def test_memory_of_a_step_grows_as_it_must():
    config = lf.ModelConfig.preset("llava-1.5-7b")

    def peak(**changes):
        options = {"stage": 2, "checkpointing": "full", "tokens": 4096, "supervised": 800, "images": 4, **changes}
        return memory.peak_of_step(config, dtype=torch.bfloat16, **options)

    full, selective, none = (peak(checkpointing=kind) for kind in ("full", "selective", "none"))
    assert full < selective < none
    # Kept at least: the residual stream and the update before each of 32 layers, 4096 x 4096 bf16 each.
    assert full > 2 * 31 * 4096 * 4096 * 2
    # At most what is known of such a layer: 4 D for the stream, 8 D for attention, 3 I for the feed-forward, all bf16.
    assert none < 32 * 4096 * (13 * 4096 + 4 * 11008) * 2 + full
    assert peak(tokens=8192) > 1.7 * full
    assert peak(stage=1, checkpointing="none") < none


def test_estimate_adds_up(small):
    model, _ = small
    freeze(model, 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tower = sum(p.numel() for p in model.vision_tower.parameters())
    options = {"stage": 2, "tokens": 200, "supervised": 50, "images": 1}
    one = memory.estimate(model, dtype=torch.bfloat16, **options)
    assert (one.weights, one.masters, one.moments, one.gradients) == (
        2 * (trained + tower),
        4 * trained,
        8 * trained,
        4 * trained,
    )
    four = memory.estimate(model, dtype=torch.bfloat16, shards=4, **options)
    assert (four.weights, four.masters, four.moments) == (2 * tower, trained, 2 * trained)
    assert four.step == one.step
    eight, host = (
        memory.estimate(model, dtype=torch.bfloat16, optimizer=kind, **options)
        for kind in ("adamw-8bit", "adamw-offload")
    )
    assert eight.moments == int(trained * 2 * (1 + 4 / 256))  # a byte for each of two, a float32 for 256
    assert one.total - eight.total == one.moments - eight.moments
    assert (host.masters, host.moments, host.gradients) == (0, 0, 4 * trained)
    assert host.host == 16 * trained and host.total == one.total - 12 * trained
    assert str(host).endswith(f"; and {host.host / 1e9:.2f} GB of the host's memory for each")
    assert str(one).startswith(f"memory on each device, estimated: {one.total / 1e9:.2f} GB (weights ")


def test_adapters_take_less_memory_than_the_whole_decoder(small):
    model, _ = small
    options = {"stage": 2, "tokens": 200, "supervised": 50, "images": 1, "dtype": torch.bfloat16}
    freeze(model, 2)
    whole = memory.estimate(model, **options)
    attach(model, LoraConfig(rank=4, alpha=8.0))
    freeze(model, 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ours = memory.estimate(model, **options)
    assert ours.moments == 8 * trained < whole.moments / 5
    assert ours.step < whole.step  # no gradient of a weight is made


def test_out_of_memory_says_what_to_change(tmp_path):
    run = make_trainer(tmp_path, None, out="run", stage=2)

    def full(batches, total):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    run.train_step = full
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run.run()
    (note,) = caught.value.__notes__
    assert "lower --max-tokens (now 8192)" in note
    assert "--activation-checkpointing selective or full (now none)" in note
    assert "torchrun (now 1)" in note
