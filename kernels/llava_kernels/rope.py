"""rope: rotary position embedding (Su et al., 2021), LLaMA's pairing of element i with element i + head_dim/2."""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head of every token by its position's angles.

    Args:
        x: (T, heads, head_dim). Query and key heads of a token can be turned together.
        cos, sin: (T, head_dim/2) float32, the angles' cosines and sines, gathered by position once for all layers.

    Returns:
        (T, heads, head_dim) in x's dtype; the products are taken in float32.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (T, 1, head_dim/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
