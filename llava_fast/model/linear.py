"""Linear: ``nn.Linear`` whose product is llava_kernels'."""

from __future__ import annotations

from torch import Tensor, nn

from llava_kernels import linear


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)
