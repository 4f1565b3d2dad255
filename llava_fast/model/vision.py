"""The CLIP vision tower, run only as far as the selected feature layer (grid features, paper section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_fast.config import ModelConfig, VisionConfig
from llava_fast.model.linear import Linear
from llava_kernels.linear import linear, multiplies_in_software


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with merged query, key and value weights."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        kw: Any = {"dtype": dtype, "device": device}
        dim, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.act = F.gelu if config.hidden_act == "gelu" else quick_gelu
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps, **kw)
        self.qkv = Linear(dim, 3 * dim, **kw)
        self.out = Linear(dim, dim, **kw)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps, **kw)
        self.fc1 = Linear(dim, inner, **kw)
        self.fc2 = Linear(inner, dim, **kw)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1 + patches, C)
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, n, head_dim) each
        if multiplies_in_software(q):
            q, k, v = q.float(), k.float(), v.float()
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(x.dtype))


class VisionTower(nn.Module):
    """CLIP ViT. Holds every layer, so that a checkpoint can be written whole, and runs only those that are needed."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        kw: Any = {"dtype": dtype, "device": device}
        vision = config.vision
        dim, patch = vision.hidden_size, vision.patch_size
        self.layers_run = config.vision_layers_run
        self.keep_class_token = config.select_feature == "cls_patch"
        self.patch_size = patch
        self.class_embedding = nn.Parameter(torch.empty(dim, **kw))
        self.patch_embedding = nn.Parameter(torch.empty(dim, 3, patch, patch, **kw))
        self.position_embedding = nn.Parameter(torch.empty(1 + vision.num_patches, dim, **kw))
        self.pre_norm = nn.LayerNorm(dim, eps=vision.layer_norm_eps, **kw)
        self.layers = nn.ModuleList(VisionLayer(vision, dtype, device) for _ in range(vision.num_hidden_layers))
        self.post_norm = nn.LayerNorm(dim, eps=vision.layer_norm_eps, **kw)  # CLIP's own head only; not in the feature

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (N, 3, H, W) -> features Z_v (N, tokens_per_image, C)."""
        x = self.pre_norm(self.embed(pixel_values))
        for layer in self.layers[: self.layers_run]:
            x = layer(x)
        return x if self.keep_class_token else x[:, 1:]

    def embed(self, pixel_values: Tensor) -> Tensor:
        n, p = pixel_values.shape[0], self.patch_size
        grid = pixel_values.shape[-1] // p
        patches = pixel_values.reshape(n, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)  # (N, grid, grid, 3, p, p)
        x = linear(patches.reshape(n, grid * grid, -1), self.patch_embedding.flatten(1))  # (N, patches, C)
        return torch.cat((self.class_embedding.expand(n, 1, -1), x), dim=1) + self.position_embedding


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's ``x * sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)
