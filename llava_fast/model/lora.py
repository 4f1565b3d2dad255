"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates, trained beside the decoder's frozen products.

``y = x W^T + s (x A^T) B^T`` for each of LLaMA's projections by itself, as PEFT has it. Where several are one product
here, such as query, key and value, their A stand below one another and are multiplied at once; each B has the rows of
the product that its projection has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_fast.errors import ConfigError
from llava_fast.model.decoder import projections
from llava_fast.model.nf4 import Nf4Linear
from llava_kernels import linear

if TYPE_CHECKING:
    from llava_fast.model.linear import Linear
    from llava_fast.model.llava import Llava

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What adapters are.

    Attributes:
        rank: rows of every A.
        alpha: the update is multiplied by ``alpha / rank``; by ``alpha / sqrt(rank)`` when ``rank_stabilized``.
        dropout: share of the adapter's input that is zeroed where gradients are recorded in training mode. The
            projections that are one product here share a mask, where PEFT draws one for each.
        targets: LLaMA's names of the projections that get an adapter.
        rank_stabilized: Kalajdzievski 2023, arXiv 2312.03732.
        base: directory or hub id of the weights below, which a saved adapter names.
        vision_tower: CLIP directory or hub id, where ``base`` is a LLaMA directory and not LLaVA.

    Raises:
        ConfigError: a value that cannot work.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rank_stabilized: bool = False
    base: str | None = None
    vision_tower: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"LoRA alpha={self.alpha} must be above 0; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA dropout={self.dropout} must be at least 0 and below 1")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"LoRA targets={', '.join(self.targets)!r}: choose some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoraLinear(nn.Module):
    """One product of the decoder and the adapters of those of its pieces that have one.

    Args:
        base: the product, (N, K); it is frozen.
        pieces: for each adapted piece its name and its rows of the product.
        config: of the adapters.

    Attributes:
        lora_A: (pieces * rank, K).
        lora_B: (rows of all pieces, rank), zeros at first, so that nothing is changed.
    """

    def __init__(self, base: Linear | Nf4Linear, pieces: dict[str, slice], config: LoraConfig, dtype: torch.dtype):
        super().__init__()
        self.base, self.config = base.requires_grad_(False), config
        self.rows = pieces
        device = base.device if isinstance(base, Nf4Linear) else base.weight.device
        count = sum(rows.stop - rows.start for rows in pieces.values())
        self.lora_A = nn.Parameter(torch.empty(len(pieces) * config.rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(count, config.rank, dtype=dtype, device=device))

    def pieces(self) -> Iterator[tuple[str, slice, Tensor, Tensor]]:
        """For each adapted piece its name, its rows of the product, and views of its A (r, K) and B (rows, r)."""
        rank, done = self.config.rank, 0
        for i, (name, rows) in enumerate(self.rows.items()):
            count = rows.stop - rows.start
            yield name, rows, self.lora_A[i * rank : (i + 1) * rank], self.lora_B[done : done + count]
            done += count

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, K) -> (T, N)."""
        dropped = None
        if self.config.dropout and self.training and torch.is_grad_enabled():
            dropped = F.dropout(x, self.config.dropout)
        frozen = (None, self.base) if isinstance(self.base, Nf4Linear) else (self.base.weight, None)
        return _LoraProduct.apply(
            x, dropped, *frozen, self.lora_A, self.lora_B, list(self.rows.values()), self.config.scale
        )

    def extra_repr(self) -> str:
        return f"{', '.join(self.rows)}, rank={self.config.rank}, scale={self.config.scale:g}"


class _LoraProduct(torch.autograd.Function):
    """The update is added where the product lies, and its input gradient likewise: no second (T, N) or (T, K) exists.

    Kept for the backward pass: x and ``x A^T``. A weight in 4 bits is expanded there a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (T, K)
        dropped: Tensor | None,  # (T, K), what the adapters see instead of x
        weight: Tensor | None,  # (N, K); None where it is in 4 bits
        packed: Nf4Linear | None,
        a: Tensor,  # (pieces * r, K)
        b: Tensor,  # (rows of all pieces, r)
        rows: list[slice],
        scale: float,
    ) -> Tensor:
        y = linear(x, packed.matrix() if packed is not None else weight)  # type: ignore[arg-type]
        seen = x if dropped is None else dropped
        low = linear(seen, a)  # (T, pieces * r)
        rank = b.shape[1]
        for i, (at, some) in enumerate(_split(rows)):
            y[:, at].addmm_(low[:, i * rank : (i + 1) * rank], b[some].t(), alpha=scale)
        ctx.save_for_backward(seen, low, weight, a, b)
        ctx.packed, ctx.rows, ctx.scale, ctx.dropped = packed, rows, scale, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, weight, a, b = ctx.saved_tensors
        dy, rank = grads[0], b.shape[1]
        d_low, db = torch.empty_like(low), torch.empty_like(b)
        for i, (at, some) in enumerate(_split(ctx.rows)):
            columns = slice(i * rank, (i + 1) * rank)
            d_low[:, columns].addmm_(dy[:, at], b[some], beta=0, alpha=ctx.scale)
            db[some].addmm_(dy[:, at].t(), low[:, columns], beta=0, alpha=ctx.scale)
        da = d_low.t() @ seen
        dx = d_dropped = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (ctx.packed.matrix() if ctx.packed is not None else weight)
            if not ctx.dropped:
                dx.addmm_(d_low, a)
        if ctx.dropped and ctx.needs_input_grad[1]:
            d_dropped = d_low @ a
        return dx, d_dropped, None, None, da, db, None, None


def _split(rows: list[slice]) -> Iterator[tuple[slice, slice]]:
    """For each piece its rows of the product, and of B."""
    done = 0
    for at in rows:
        count = at.stop - at.start
        yield at, slice(done, done + count)
        done += count


def attach(model: Llava, config: LoraConfig, *, seed: int = 0) -> None:
    """Give the decoder adapters, in place. They change nothing until they are trained or filled.

    Args:
        model: without adapters. Its decoder and tower are frozen; the projector is left as it is.
        config: of the adapters; they have the model's dtype.
        seed: of every A, drawn as PEFT draws it, from U(-1/sqrt(K), 1/sqrt(K)), the same on every device.

    Raises:
        ConfigError: the model has adapters, or is quantized for inference.
    """
    if lora_of(model) is not None:
        raise ConfigError("the model has LoRA adapters already; merge them first (llava_fast.model.lora.merge)")
    model.decoder.requires_grad_(False)
    if model.lm_head is not None:
        model.lm_head.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.decoder.layers:
        for product, pieces in projections(model.config.text).items():
            base = getattr(layer, product)
            if not isinstance(base, nn.Linear | Nf4Linear):
                raise ConfigError(
                    f"LoRA cannot stand on {type(base).__name__}, which has no backward pass; load the model with "
                    f"quantization=None"
                )
            chosen = {name: rows for name, rows in pieces.items() if name in config.targets}
            if chosen:
                adapted = LoraLinear(base, chosen, config, model.dtype)  # type: ignore[arg-type]
                _draw(adapted.lora_A, generator)
                setattr(layer, product, adapted)


@torch.no_grad()
def _draw(a: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(a.shape[1])
    a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def merge(model: Llava) -> None:
    """Add every adapter to the weight that it stands on and take it away, in place; sums are taken in float32.

    Raises:
        ConfigError: the weights are in 4 bits, where the sum would be rounded away.
    """
    for layer in model.decoder.layers:
        for product in projections(model.config.text):
            adapted = getattr(layer, product)
            if not isinstance(adapted, LoraLinear):
                continue
            if isinstance(adapted.base, Nf4Linear):
                raise ConfigError(
                    "adapters on a base in 4 bits cannot be merged into it; save them (llava_fast.save) and merge the "
                    "saved adapter into the full weights (python -m llava_fast.train.merge)"
                )
            for _, rows, a, b in adapted.pieces():
                weight = adapted.base.weight[rows]
                weight.copy_(torch.addmm(weight.float(), b.float(), a.float(), alpha=adapted.config.scale))
            setattr(layer, product, adapted.base)


def lora_of(model: nn.Module) -> LoraConfig | None:
    """What the model's adapters are, None where it has none."""
    return next((m.config for m in model.modules() if isinstance(m, LoraLinear)), None)
