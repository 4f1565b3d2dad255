"""linear_cross_entropy: output head and next-token loss, for the supervised rows alone."""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of ``hidden @ weight.T`` against ``labels``, taken in float32.

    Args:
        hidden: (L, D) final hidden states of the supervised positions.
        weight: (V, D) output head.
        labels: (L,) int64 targets, all of them real (no ignored ones).

    Returns:
        float32 scalar, the sum over the L rows; zero, still attached to the graph, when L is 0.
    """
    logits = F.linear(hidden, weight).float()  # (L, V)
    return F.cross_entropy(logits, labels, reduction="sum")
