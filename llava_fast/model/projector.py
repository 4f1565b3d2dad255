"""The projector W between vision tower and decoder: linear (the paper) or a two-layer MLP (LLaVA-1.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_fast.config import ModelConfig
from llava_kernels import linear_gelu, project_splice


class Projector(nn.Module):
    """``linear_1`` alone, or ``linear_2(gelu(linear_1(x)))``. The last product is fused with the splice."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        dim = config.text.hidden_size
        self.linear_1 = nn.Linear(config.vision.hidden_size, dim, dtype=dtype, device=device)
        self.linear_2 = nn.Linear(dim, dim, dtype=dtype, device=device) if config.projector == "mlp2x_gelu" else None

    def forward(
        self, features: Tensor, embedding: Tensor, input_ids: Tensor, image_rows: Tensor, text_rows: Tensor
    ) -> Tensor:
        """features: (..., C) of P image rows, embedding: (V, D) token table -> decoder input (T, D)."""
        last = self.linear_1
        if self.linear_2 is not None:
            features = linear_gelu(features, self.linear_1.weight, self.linear_1.bias)
            last = self.linear_2
        return project_splice(features, last.weight, last.bias, embedding, input_ids, image_rows, text_rows)
