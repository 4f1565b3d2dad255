"""What ranks must do alike, seen from one process. torch's fake backend leaves every tensor as it is."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_fast.data.scenes import Scenes
from llava_fast.errors import ConfigError
from llava_fast.train.checkpoints import STATE
from llava_fast.train.distributed import World, empty_batch, is_shared, mesh_of, norm_of, part_for, share_out
from llava_fast.train.optimizer import MasterAdamW
from llava_fast.train.sharded_checkpoints import METADATA, ShardWriter, find_newest, read
from llava_fast.train.stages import freeze
from llava_fast.train.trainer import held_out_loss
from tests.train.ranks import make_trainer, mixed

CPU = torch.device("cpu")


@pytest.fixture
def pretend():
    """Makes the World of one rank among several, of which the others do not exist."""

    def make(rank: int, size: int, group: int) -> World:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return World(rank, size, size, mesh_of(CPU, size, group))

    yield make
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Notes every collective: its name, and the dtype and size of what it gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            result = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.seen.append((str(func), result.dtype, result.numel()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "shard_frozen"), [(1, False), (1, True), (2, False)])
def test_every_batch_takes_part_in_the_same_collectives(pretend, tmp_path, stage, shard_frozen):
    """Pictures on one rank, text alone on another, nothing on a third: one that missed a collective would hang all."""
    world = pretend(0, 2, 2)
    run = make_trainer(tmp_path, None, out="run", stage=stage)
    model = run.model.to(torch.bfloat16)
    freeze(model, stage)
    share_out(model, world, train_decoder=stage == 2, shard_frozen=shard_frozen)
    rows, pack = mixed(), run.processor.pack
    batches = [pack(rows[1:5]), pack([row for row in rows if "image" not in row][:3]), empty_batch(model.config)]
    assert [batch.num_images > 0 for batch in batches] == [True, False, False]
    seen = []
    for batch in batches:
        with Collectives() as watch:
            model.loss(batch.to("cpu", torch.bfloat16), denominator=7).backward()
        seen.append(watch.seen)
    assert seen[0] == seen[1] == seen[2]

    kinds = {name.split(".")[1]: dtype for name, dtype, _ in seen[0]}
    assert kinds == {"_allgather_base_": torch.bfloat16, "_reduce_scatter_base_": torch.float32}
    assert all(is_shared(p) and p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert not any(map(is_shared, model.vision_tower.parameters()))


@pytest.mark.parametrize("size", [2, 4])
def test_the_norm_is_that_of_all_shards(pretend, monkeypatch, size):
    """Summed over the ranks that share a copy of the weights, and not over the copies."""
    world = pretend(0, size, 2)
    placements = [Shard(0)] if size == 2 else [Replicate(), Shard(0)]
    param = DTensor.from_local(torch.zeros(3, 2), world.mesh, placements)
    groups = []

    def two_alike(tensor, group):
        groups.append(group)
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", two_alike)
    norm = norm_of([torch.full((3, 2), 2.0), torch.full((2,), 1.0)], param)
    assert norm.item() == pytest.approx((2 * (6 * 4 + 2 * 1)) ** 0.5)
    assert groups == [world.mesh.get_group("shard")]


def test_of_a_whole_checkpoint_a_rank_takes_its_shard(pretend):
    """As one process wrote it; and what the rank writes is a part of the whole, not a whole of its own."""
    world = pretend(1, 2, 2)
    whole = torch.arange(12.0).reshape(6, 2)
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(6, 2), world.mesh, [Shard(0)], src_data_rank=None))
    assert part_for(param, whole).tolist() == whole[3:].tolist()

    adam = MasterAdamW([("w", param)], lr=1e-2)
    adam.load({"weight.w": whole, "step.w": torch.tensor(4.0), "exp_avg.w": -whole, "exp_avg_sq.w": whole})
    state = adam.state()
    assert state["step.w"].item() == 4
    for key, expected in {"weight.w": whole, "exp_avg.w": -whole, "exp_avg_sq.w": whole}.items():
        assert is_shared(state[key]) and state[key].shape == (6, 2)
        assert state[key].to_local().tolist() == expected[3:].tolist()
        place = adam.layout(key, torch.empty(6, 2, device="meta"))
        assert is_shared(place) and place.to_local().shape == (3, 2)


def test_an_error_on_rank_0_is_raised_and_not_swallowed(pretend):
    world = pretend(0, 2, 2)

    def refuse():
        raise ConfigError("not this folder")

    with pytest.raises(ConfigError, match="not this folder"):
        world.on_main(refuse)
    assert world.on_main(lambda: "well") == "well"


class Together:
    """Two ranks in two threads: what a World's :meth:`gather` and :meth:`on_main` do, without a process group."""

    size, sharded = 2, True

    def __init__(self, rank: int, table: list, barrier: threading.Barrier):
        self.rank, self.table, self.barrier = rank, table, barrier
        self.main = rank == 0

    def gather(self, value):
        self.table[self.rank] = value
        self.barrier.wait(60)
        found = list(self.table)
        self.barrier.wait(60)
        return found

    def on_main(self, work):
        return self.gather(work() if self.main else None)[0]


def on_both(work) -> list:
    """What ``work(world)`` gives on each of two ranks."""
    table, barrier, found = [None, None], threading.Barrier(2), [None, None]

    def run(rank: int) -> None:
        try:
            found[rank] = work(Together(rank, table, barrier))
        except Exception as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_sizes_measured_by_two_are_those_measured_by_one(tmp_path):
    """Of an odd number of samples; one that cannot be used is told on both."""

    def measured(world):
        run = make_trainer(tmp_path, world, out="run", on_bad_sample="skip")
        run.samples = [*mixed(20), {"id": "empty", "conversations": []}]
        return run.measure(), run.skipped

    alone, skipped = measured(None)
    assert len(set(map(tuple, alone.tolist()))) > 10 and list(skipped) == ["empty"]
    for sizes, told in on_both(measured):
        np.testing.assert_array_equal(sizes, alone)
        assert told == skipped


def test_dropout_differs_between_steps_and_ranks_and_not_between_starts(tmp_path):
    run = make_trainer(tmp_path, None, out="run")
    run.prepare()
    batches, _ = next(run.load())
    drawn = {}
    for draw in (1, 2):
        for rank in (0, 1):
            for step in (0, 1):
                run.world = SimpleNamespace(sharded=True, rank=rank, sum=lambda tensor: tensor)
                run.step = step
                torch.manual_seed(draw)  # whatever was before
                run.train_step(batches, total=4)
                drawn.setdefault((rank, step), set()).add(torch.initial_seed())
    assert all(len(seeds) == 1 for seeds in drawn.values())
    assert len(set.union(*drawn.values())) == len(drawn) == 4


def test_the_loss_is_divided_by_the_count_of_all_ranks(tmp_path):
    """As if another rank had three times as many supervised tokens."""
    run = make_trainer(tmp_path, None, out="run")
    run.prepare()
    batches, _ = next(run.load())
    alone = run.train_step(batches, total=4)
    again = make_trainer(tmp_path, None, out="again")
    again.prepare()
    again.world = SimpleNamespace(sharded=True, rank=0, sum=lambda tensor: tensor.mul_(4))
    shared = again.train_step(batches, total=4)
    torch.testing.assert_close(shared.loss * 4, alone.loss)
    torch.testing.assert_close(shared.grad_norm * 4, alone.grad_norm)
    assert shared.supervised == alone.supervised > 0


def test_what_is_told_of_a_step_is_of_all_ranks(tmp_path):
    """Losses, tokens and operations; the norm is already of all."""
    run = make_trainer(tmp_path, None, out="run")
    run.prepare()
    batches, _ = next(run.load())
    result = run.train_step(batches, total=4)
    loss, norm, tokens, supervised = result.loss.item(), result.grad_norm.item(), result.tokens, result.supervised
    run.world = SimpleNamespace(sharded=True, sum=lambda tensor: tensor.mul_(3))
    losses, norms = run.fetch([result])
    assert losses == pytest.approx([3 * loss]) and norms == pytest.approx([norm])
    assert (result.tokens, result.supervised) == (3 * tokens, 3 * supervised)


def test_a_rank_without_a_batch_takes_as_many_passes(tmp_path):
    """A batch of nothing in the place of each whose samples are all bad."""
    run = make_trainer(tmp_path, None, out="run", max_tokens=160)
    run.prepare()
    whole = [batches for batches, _ in run.load()]
    assert max(map(len, whole)) > 1
    run.share = SimpleNamespace(plan=run.plan)
    run.load_share = lambda plan: [(batches[1:], []) for batches in whole]
    for (batches, _), before in zip(run.load(), whole, strict=True):
        assert len(batches) == len(before) and batches[:-1] == before[1:]
        assert batches[-1].num_supervised == 0


@pytest.fixture
def alone():
    """The World of a single rank under gloo, which writes for itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 1, mesh_of(CPU, 1, 1), dist.new_group(), dist.new_group())
    dist.destroy_process_group()


@pytest.mark.parametrize("shared", [False, True])
def test_shards_get_their_name_when_all_are_written(alone, tmp_path, monkeypatch, shared):
    """What training changes meanwhile is not in the checkpoint."""
    write, may_go_on = dcp.FileSystemWriter.write_data, threading.Event()
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", lambda *inputs: may_go_on.wait(60) and write(*inputs))
    writer = ShardWriter(tmp_path, 2, alone)
    w = torch.zeros(6, 2)
    kept = DTensor.from_local(w, alone.mesh, [Shard(0)]) if shared else w
    writer.save(1, {"w": kept}, {"note": 5})
    w += 1
    assert writer.published is None
    assert not list(tmp_path.glob("step-*"))
    may_go_on.set()
    writer.wait()
    path, state, faults = find_newest(tmp_path, alone)
    assert path == writer.published and (state["step"], state["note"], faults) == (1, 5, [])
    assert not read(path, alone, lambda name, whole: torch.empty_like(whole, device="cpu"))["w"].any()


@pytest.mark.parametrize("name", [METADATA, STATE, "__0_0.distcp"])
def test_damage_that_one_rank_finds_makes_all_pass_over(alone, tmp_path, name):
    """Each looks at its share of the files; all go on from the same checkpoint, and the damaged one is replaced."""
    writer = ShardWriter(tmp_path, 2, alone)
    for step in (1, 2, 3):
        writer.save(step, {"w": torch.full((50,), float(step))}, {})
        writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert os.readlink(tmp_path / "latest") == "step-00000003"
    file = tmp_path / "step-00000003" / name
    file.write_bytes(file.read_bytes()[:-7])
    for path, state, faults in on_both(lambda world: find_newest(tmp_path, world)):
        assert (path.name, state["step"]) == ("step-00000002", 2)
        assert len(faults) == 1 and f"{name} is truncated" in faults[0]
    writer.save(3, {"w": torch.zeros(50)}, {})
    writer.wait()
    assert [path.name for path, _, _ in on_both(lambda world: find_newest(tmp_path, world))] == ["step-00000003"] * 2


def test_held_out_samples_fewer_than_ranks(tmp_path):
    """Every rank takes as many passes, those without a sample too; together they give the loss of one process."""
    run = make_trainer(tmp_path, None, out="run")
    args = run.model, run.processor, run.recipe, Scenes(2, 6), 0
    expected = held_out_loss(*args)
    parts, passes, loss = [], [], run.model.loss
    run.model.loss = lambda batch, denominator: passes.append(rank) or loss(batch, denominator)

    def keep(part):
        parts.append(part.clone())
        return part.clamp(min=1)

    for rank in range(3):
        world = SimpleNamespace(sharded=True, rank=rank, size=3, on_main=lambda work: work(), sum=keep)
        held_out_loss(*args, world)
    assert passes == [0, 1, 2]
    total, count = sum(parts).tolist()
    assert total / count == pytest.approx(expected, rel=1e-6)
