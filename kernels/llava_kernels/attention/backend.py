"""What a back end of varlen_attention is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], Tensor | None, bool], Tensor]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way of computing varlen_attention.

    Args:
        attend: (q, k, v, seqlens, cu_seqlens or None, causal) -> out. No sequence is empty and there is at least one.
        unfit: (device, dtype, head_dim) -> why it cannot run them, or None.
        load: imports what it needs; raises ImportError when that is missing.
        install: how to get what it needs.
    """

    attend: Attend
    unfit: Callable[[torch.device, torch.dtype, int], str | None] = lambda device, dtype, head_dim: None
    load: Callable[[], Any] = lambda: None
    install: str = ""

    def missing(self) -> str | None:
        """Why what it needs cannot be imported, or None."""
        return _failure(self.load)


@cache  # a failing import searches the whole path, too slow to do once a layer
def _failure(load: Callable[[], Any]) -> str | None:
    try:
        load()
    except (ImportError, OSError) as error:  # OSError: a library built for another CUDA
        return str(error)
    return None


@cache
def capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def unfit_for_flash(
    device: torch.device, dtype: torch.dtype, head_dim: int, cards: Sequence[int] = (), largest: int = 256
) -> str | None:
    """What the flash-attention kernels ask for: a card from sm_80 on (or of the families in ``cards``), 16 bits."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    card = capability(device)
    if card < 80 or (cards and card // 10 * 10 not in cards):
        return f"needs a card of {' or '.join(f'sm_{c}' for c in cards) or 'sm_80 or later'}, not sm_{card}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > largest:
        return f"takes head sizes that are multiples of 8 up to {largest}, not {head_dim}"
    return None


def on_device(seqlens: Sequence[int], cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """``cu_seqlens`` side by side, or (S+1,) int32 built from the host's lengths by one copy that does not block."""
    if cu_seqlens is not None:
        return cu_seqlens.contiguous()
    ends = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return ends.to(device, non_blocking=True)
