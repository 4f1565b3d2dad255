"""AdamW on float32 master weights, with gradients accumulated in float32, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava_fast.train.distributed import like, local, norm_of, part_for


def cosine(step: int, total: int, warmup_ratio: float) -> float:
    """Factor on the peak learning rate at ``step`` of ``total``: linear warm-up, then a cosine to 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, total - warmup))


class MasterAdamW:
    """AdamW whose weights, moments and gradient sums are float32 whatever dtype the model computes in.

    A parameter that is float32 is its own master. For any other, each backward pass adds its gradient to a float32 sum
    and drops it, so accumulation over many bins loses nothing, and the step is taken on a float32 copy. Of a parameter
    that ranks share, the master is this rank's shard, and gradients are clipped by their norm over all ranks.

    Args:
        named: the trained parameters by name.
        lr, projector_lr: peak learning rates.
        weight_decay: on matrices; biases and norms have none.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        projector_lr: float | None = None,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
    ):
        self.params = dict(named)
        self.grad_clip = grad_clip
        self.masters: dict[str, Tensor] = {}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, param in self.params.items():
            master = self._master_of(param)
            self.masters[name] = master
            rate = projector_lr if projector_lr and name.startswith("projector.") else lr
            decay = weight_decay if param.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(master)
        self.adam = torch.optim.AdamW(
            [{"params": p, "lr": r, "peak": r, "weight_decay": d} for (r, d), p in groups.items()], fused=True
        )

    @staticmethod
    def _master_of(param: nn.Parameter) -> Tensor:
        if isinstance(param, DTensor):
            return local(param)
        if param.dtype == torch.float32:
            return param
        master = param.detach().float()

        def collect(param: Tensor) -> None:
            assert param.grad is not None
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad += param.grad
            param.grad = None

        param.register_post_accumulate_grad_hook(collect)
        return master

    def step(self, factor: float) -> Tensor:
        """One update at ``factor`` times the peak learning rates; returns the gradient norm () before clipping."""
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        masters = list(self.masters.values())
        if any(isinstance(p, DTensor) for p in self.params.values()):
            norm = norm_of(list(self.params.values()))
            for name, param in self.params.items():
                self.masters[name].grad, param.grad = None if param.grad is None else local(param.grad), None
            torch.nn.utils.clip_grads_with_norm_(masters, self.grad_clip or math.inf, norm)
        else:
            norm = torch.nn.utils.clip_grad_norm_(masters, self.grad_clip or math.inf)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        for name, param in self.params.items():
            if param is not self.masters[name] and not isinstance(param, DTensor):
                param.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from: masters and moments by name, shards as parts of DTensors."""
        tensors = {f"weight.{name}": like(self.params[name], master.detach()) for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = like(self.params[name], value) if value.dim() else value
        return tensors

    def layout(self, name: str, whole: Tensor) -> Tensor:
        """An empty tensor to read ``name`` of :meth:`state` into: this rank's shard where the parameter is shared."""
        param = self.params.get(name.partition(".")[2])
        if isinstance(param, DTensor) and whole.dim():
            return like(param, torch.empty_like(local(param), dtype=whole.dtype))
        return torch.empty_like(whole, device="cpu")

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state that :meth:`state` gave, on parameters of the same names and shapes."""
        for name, master in self.masters.items():
            param = self.params[name]
            master.copy_(part_for(param, tensors[f"weight.{name}"]))
            moments = {k: tensors[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors}
            if moments:
                parts = {k: part_for(param, v) if v.dim() else v for k, v in moments.items()}
                self.adam.state[master] = {k: v.to(master.device) for k, v in parts.items()}
        self._publish()
