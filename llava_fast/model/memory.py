"""A module that was made on the meta device gets its memory."""

from __future__ import annotations

import torch
from torch import nn


def give_memory(module: nn.Module, device: torch.device | str) -> None:
    """Put every parameter and buffer on ``device``, with content as it comes.

    ``nn.Module.to_empty`` does the same by ``torch.empty_like``, which for a tensor on the meta device imports sympy: a
    second of each start.
    """
    module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))
