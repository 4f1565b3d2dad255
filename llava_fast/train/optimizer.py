"""AdamW on float32 master weights, with gradients accumulated in float32, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.errors import ConfigError
from llava_fast.train.distributed import is_shared, like, local, norm_of, part_for


def cosine(step: int, total: int, warmup_ratio: float) -> float:
    """Factor on the peak learning rate at ``step`` of ``total``: linear warm-up, then a cosine to 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, total - warmup))


class MasterAdamW:
    """AdamW whose weights and gradient sums are float32 whatever dtype the model computes in.

    A parameter that is float32 is its own master. For any other, each backward pass adds its gradient to a float32 sum
    and drops it, so accumulation over many bins loses nothing, and the step is taken on a float32 copy. Of a parameter
    that ranks share, the master is this rank's shard, and gradients are clipped by their norm over all ranks.

    Args:
        named: the trained parameters by name.
        lr, projector_lr: peak learning rates.
        weight_decay: on matrices; biases and norms have none.
        kind: "adamw" keeps the moments in float32; "adamw-8bit" in 8 bits, a scale for each 256 values (Dettmers et al.
            2021, arXiv 2110.02861), by torchao; "adamw-offload" keeps masters and moments in the host's memory and
            takes the step there. torchao's own offload keeps masters in the dtype of the parameters, and sends
            gradients away before they can be clipped.

    Attributes:
        masters: float32, by name.
        sums: gradient sums of this step, by name, of parameters that are not float32.

    Raises:
        ConfigError: 8 bits are asked for and torchao is not installed.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        projector_lr: float | None = None,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        kind: str = "adamw",
    ):
        self.params = dict(named)
        self.grad_clip = grad_clip
        self.offload = kind == "adamw-offload"
        self.masters: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, param in self.params.items():
            master = self.masters[name] = self._master_of(name, param)
            rate = projector_lr if projector_lr and name.startswith("projector.") else lr
            decay = weight_decay if param.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(master)
        make = _adamw_8bit() if kind == "adamw-8bit" else partial(torch.optim.AdamW, fused=True)
        self.adam: Any = make(
            [{"params": p, "lr": r, "peak": r, "weight_decay": d} for (r, d), p in groups.items()],
            lr=lr,
        )

    def _master_of(self, name: str, param: nn.Parameter) -> Tensor:
        if not is_shared(param) and param.dtype != torch.float32:
            param.register_post_accumulate_grad_hook(partial(self._collect, name))
        there = local(param).detach() if self.offload else local(param)
        if self.offload:
            return _on_host(there)
        return there if there.dtype == torch.float32 else there.detach().float()

    def _collect(self, name: str, param: Tensor) -> None:
        assert param.grad is not None
        if name in self.sums:
            self.sums[name] += param.grad
        else:
            self.sums[name] = param.grad.float()
        param.grad = None

    def step(self, factor: float) -> Tensor:
        """One update at ``factor`` times the peak learning rates; returns the gradient norm () before clipping."""
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's; another object would be compiled anew
                group["lr"].fill_(group["peak"] * factor)
            else:
                group["lr"] = group["peak"] * factor
        gradients = self._take_gradients()
        norm = norm_of(list(gradients.values()), next(iter(self.params.values())))
        if self.grad_clip and gradients:
            torch._foreach_mul_(list(gradients.values()), (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        self._hand_over(gradients)
        self.adam.step()
        if not self.offload:
            self.adam.zero_grad(set_to_none=True)
        self._publish()
        return norm

    def _take_gradients(self) -> dict[str, Tensor]:
        """The float32 gradients of this step, on the device; nothing else holds them afterwards."""
        taken = {}
        for name, param in self.params.items():
            if name in self.sums:
                taken[name] = self.sums.pop(name)
            elif param.grad is not None:
                taken[name], param.grad = local(param.grad), None
        return taken

    def _hand_over(self, gradients: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            if not self.offload:
                master.grad = gradients.get(name)
            elif name in gradients:
                if master.grad is None:
                    master.grad = _on_host(gradients[name])
                master.grad.copy_(gradients[name], non_blocking=True)
        if self.offload:
            _wait_for_copies()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, param in self.params.items():
            if self.offload or not (is_shared(param) or param is self.masters[name]):
                local(param).copy_(self.masters[name], non_blocking=True)
        if self.offload:
            _wait_for_copies()

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from: masters and moments by name, in float32, shards as parts of DTensors."""
        tensors = {f"weight.{name}": like(self.params[name], master.detach()) for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                value = value.dequantize() if hasattr(value, "qmap") else value
                tensors[f"{key}.{name}"] = like(self.params[name], value) if value.dim() else value
        return tensors

    def layout(self, name: str, whole: Tensor) -> Tensor:
        """An empty tensor to read ``name`` of :meth:`state` into: this rank's shard where the parameter is shared."""
        name = name.partition(".")[2]
        param = self.params.get(name)
        if param is not None and is_shared(param) and whole.dim():
            return like(param, torch.empty_like(self.masters[name], dtype=whole.dtype))
        return torch.empty_like(whole, device="cpu")

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state that :meth:`state` gave, on parameters of the same names and shapes.

        Moments in 8 bits are rounded anew: 1.5% of the largest of 256 apart at most, where the largest is negative,
        which torchao's codes cannot hold exactly, or where another number of ranks divides them into other 256s.
        """
        for name, master in self.masters.items():
            param = self.params[name]
            master.copy_(part_for(param, tensors[f"weight.{name}"]))
            moments = {k: tensors[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors}
            if moments:
                parts = {k: part_for(param, v) if v.dim() else v for k, v in moments.items()}
                self.adam.state[master] = {k: self._moment(master, k, v) for k, v in parts.items()}
        self._publish()

    def _moment(self, master: Tensor, key: str, value: Tensor) -> Tensor:
        if not hasattr(self.adam, "_new_buffer"):
            return value.to(master.device)
        if not value.dim():  # torchao counts steps on the host
            return value.cpu()
        return self.adam._new_buffer(master, key == "exp_avg").copy_(value)  # it decides what is kept in 8 bits


def _on_host(tensor: Tensor) -> Tensor:
    """A float32 copy in the host's memory, pinned where there is a card to copy to."""
    host = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())
    return host.copy_(tensor)


def _wait_for_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _adamw_8bit() -> Callable[..., Any]:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError("--optimizer adamw-8bit needs torchao; pip install llava-fast[torchao]") from None
    return AdamW8bit
