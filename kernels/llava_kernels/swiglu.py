"""swiglu: the gated activation of LLaMA's feed-forward layer (Shazeer, 2020)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` on the merged product. gate_up: (..., 2F), gate first. -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
