"""Training on several GPUs and nodes: who takes part, and the model's weights shared out, from outside, by FSDP2."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llava_fast.batch import PackedBatch
from llava_fast.config import IGNORE, ModelConfig
from llava_fast.errors import ConfigError
from llava_fast.model import Llava
from llava_fast.model.lora import attach, lora_of

if TYPE_CHECKING:  # a second to import, which one process alone need not wait
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

# Between hosts a rank may wait for another that reads data or writes a checkpoint; one that died is noticed at once.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """The processes of a run. The default is one process alone, in which every method does nothing or next to it.

    Attributes:
        rank, size: this process, and how many there are.
        local_size: how many there are on this node.
        mesh: of the devices, ("replicate", "shard"); None when the run was not started by torchrun.
        host: group for what travels between the hosts' memories, whatever the devices do.
        disk: a group of its own for checkpoints, which are written while training goes on.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    mesh: DeviceMesh | None = None
    host: Any = None
    disk: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.mesh is not None

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank; the devices are not waited for."""
        if not self.sharded:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.host)
        return bool(said)

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor``, which lies on the device, summed over the ranks in place."""
        if self.sharded:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if not self.sharded:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.host)
        return found

    def on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank; an error there is raised on every rank."""
        if not self.sharded:
            return work()
        result: list[Any] = [None, None]
        if self.main:
            try:
                result[0] = work()
            except Exception as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, group=self.host)
        if result[1] is not None:
            raise result[1]
        return result[0]


@contextmanager
def joined(device: torch.device, shard_size: int | None = None) -> Iterator[tuple[World, torch.device]]:
    """This process's place among those that torchrun started, and its device; one process alone without torchrun.

    Args:
        device: "cuda" becomes this process's own card.
        shard_size: ranks that share one copy of the weights; default those of a node. Between nodes each such group
            holds a copy, and gradients are added up (hybrid sharding).

    Raises:
        ConfigError: ``shard_size`` does not divide the number of ranks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield World(), device
        return
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    group = shard_size or local
    if size % group:
        raise ConfigError(f"--shard-size {group} does not divide the {size} processes; give a divisor")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=PrefixStore(_attempt(), store), rank=rank, world_size=size)
    try:
        mesh = mesh_of(device, size, group)
        host, disk = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        yield World(dist.get_rank(), size, local, mesh, host, disk), device
    finally:
        dist.destroy_process_group()


def _attempt() -> str:
    """What names this start of the processes: torchrun's store still holds the addresses of those that it restarts.

    On several nodes the counts of restarts can differ, and torchrun must be told to open a new store each time, with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if nodes == 1 else "attempt"


def mesh_of(device: torch.device, size: int, group: int) -> DeviceMesh:
    """``size`` devices in copies of ``group`` shards; without the dimension of the copies when there is one."""
    from torch.distributed.device_mesh import init_device_mesh

    copies = size // group
    shape, names = ((copies, group), ("replicate", "shard")) if copies > 1 else ((group,), ("shard",))
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def share_out(model: Llava, world: World, *, train_decoder: bool, shard_frozen: bool) -> None:
    """Share the weights out among the ranks, with ``requires_grad`` already set; :meth:`Llava.loss` works as before.

    What is trained becomes float32 shards (the master weights), gathered layer by layer in the dtype that the model
    computes in; gradients are added up in float32 over all ranks, not averaged. The frozen vision tower stays whole on
    every rank, so a batch without an image misses no collective. So does a frozen decoder, unless ``shard_frozen``.
    Below LoRA adapters, which are shared out in float32 like all that is trained, the frozen weights are too.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    assert world.mesh is not None
    dtype = model.dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary angles stay float32
    )
    kw: dict[str, Any] = {"mesh": world.mesh, "mp_policy": policy}
    shards: list[nn.Module] = [model.projector]
    if train_decoder or shard_frozen:
        shards += [*model.decoder.layers, model]
    for module in shards:
        if module is model:
            kw |= {"ignored_params": set(model.vision_tower.parameters())}
        for param in module.parameters():
            if param.requires_grad and not is_shared(param):
                param.data = param.data.float()
        fully_shard(module, **kw)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other; a sum is what is wanted
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "loss")


def is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is shared out among ranks; it cannot be where nothing has imported DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter or gradient, in the same memory; a whole tensor as it is."""
    return tensor.to_local().detach() if is_shared(tensor) else tensor


def like(param: Tensor, shard: Tensor) -> Tensor:
    """``shard`` as the part of a tensor that is laid out as ``param`` is."""
    if not is_shared(param):
        return shard
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return whole.to(shard.device)  # from_local moves a shard that lies on the host


def part_for(param: Tensor, value: Tensor) -> Tensor:
    """Of ``value``, whole or shared out as ``param`` is, what this rank holds of ``param``."""
    if not is_shared(param):
        return value
    if not is_shared(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
    return value.to_local()


def norm_of(gradients: list[Tensor], param: Tensor) -> Tensor:
    """Norm () of ``gradients``, this rank's shards where they are shared as ``param`` is; no host waits for it."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if not is_shared(param):
        return norm
    from torch.distributed.tensor import Shard

    total = norm.square().float()
    dimension = [isinstance(p, Shard) for p in param.placements].index(True)
    dist.all_reduce(total, group=param.device_mesh.get_group(dimension))
    return total.sqrt()


@torch.no_grad()
def gathered(model: Llava, world: World, names: set[str], dtype: torch.dtype) -> Llava | None:
    """A model on rank 0's host that holds the weights ``names`` of ``model``, whole and in ``dtype``; its others have
    no contents. None on the other ranks. One tensor at a time is gathered."""
    whole = Llava(model.config, dtype=dtype, device="meta", seed=None) if world.main else None
    adapters = lora_of(model)
    if whole and adapters:
        attach(whole, adapters)
    for name, param in model.named_parameters():
        if name not in names:
            continue
        value = param.full_tensor() if is_shared(param) else param
        if whole:
            path, _, leaf = name.rpartition(".")
            copy = nn.Parameter(value.to("cpu", dtype, copy=True), requires_grad=False)
            whole.get_submodule(path).register_parameter(leaf, copy)
    return whole


def empty_batch(config: ModelConfig) -> PackedBatch:
    """Two tokens of text, nothing supervised: a rank without samples takes part in the step with it, at weight zero."""
    size = config.vision.image_size
    return PackedBatch(
        input_ids=torch.full((2,), config.text.bos_token_id),
        labels=torch.full((2,), IGNORE),
        position_ids=torch.arange(2, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        pixel_values=torch.zeros(0, 3, size, size),
        image_token_id=config.image_token_id,
    )


def place() -> str:
    """Rank and host, for messages of what one rank alone has met."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
