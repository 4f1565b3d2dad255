"""linear_gelu: the first half of the MLP projector of LLaVA-1.5."""

import torch.nn.functional as F
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x @ weight.T + bias)`` with the exact (erf) GELU. x: (..., C), weight: (D, C), bias: (D,). -> (..., D)."""
    return F.gelu(F.linear(x, weight, bias))
