"""The vision tower on a CPU through the C library, in one call and on the decoder's threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_fast.model import Llava
from llava_fast.model.linear import Linear
from llava_fast.model.vision import VisionLayer
from llava_kernels import dispatch, library

MULTIPLY_BFLOAT16 = ("avx512bf16", "amx")  # the others' products of bfloat16 are faster in torch
WIDEST_FLOAT32 = 512  # wider layers' products of float32 are faster in torch, which then waits for its threads little


class NativeTower:
    """Args:
    model: its weights are used where they are.
    handle: nobody else uses it meanwhile.
    """

    def __init__(self, model: Llava, handle: library.Handle):
        tower, vision = model.vision_tower, model.config.vision
        self.tower, self.handle = tower, handle
        described = [_layer(layer) for layer in tower.layers[: tower.layers_run]]
        self.patches = tower.patch_embedding.detach().flatten(1)  # kept: of a parameter laid out otherwise it is a copy
        self.args = library.VisionArgs(
            dtype=library.DTYPES[model.dtype],
            layers=len(described),
            width=vision.hidden_size,
            heads=vision.num_attention_heads,
            eps=vision.layer_norm_eps,
            patch_embedding=library.float_weight(self.patches),
            class_embedding=tower.class_embedding.data_ptr(),
            position_embedding=tower.position_embedding.data_ptr(),
            norm_weight=tower.pre_norm.weight.data_ptr(),
            norm_bias=tower.pre_norm.bias.data_ptr(),
            layer=(library.VisionLayer * len(described))(*described),
            patch=vision.patch_size,
            grid=vision.image_size // vision.patch_size,
        )
        self.tokens = vision.num_patches + 1

    @staticmethod
    def misfit(model: Llava, handle: library.Handle) -> str | None:
        """Why the library does not run this model's tower, None where it does."""
        vision, layers = model.config.vision, model.vision_tower.layers
        if dispatch.chosen() not in ("auto", "native"):
            return f"{dispatch.chosen()!r} was asked for"
        if model.dtype not in library.DTYPES:
            return f"the C library has no {str(model.dtype).removeprefix('torch.')}"
        if vision.hidden_act != "quick_gelu" or vision.hidden_size > 256 * vision.num_attention_heads:
            return f"the C library has no {vision.hidden_act}, or no heads so wide"
        if not all(type(getattr(layer, name)) is Linear for layer in layers for name in ("qkv", "out", "fc1", "fc2")):
            return "the C library takes plain weights alone"
        half = model.dtype == torch.bfloat16
        fast = handle.instructions in MULTIPLY_BFLOAT16 if half else vision.hidden_size <= WIDEST_FLOAT32
        return None if fast else "torch's products are faster here"

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) float32 -> features Z_v (N, tokens_per_image, C) in the model's dtype."""
        pixels = pixel_values.contiguous()
        out = torch.empty(len(pixels), self.tokens, self.args.width, dtype=self.tower.patch_embedding.dtype)
        self.args.images, self.args.pixels, self.args.out = len(pixels), pixels.data_ptr(), out.data_ptr()
        self.handle.vision_tower(self.args)
        return out if self.tower.keep_class_token else out[:, 1:]


def _layer(layer: Any) -> library.VisionLayer:
    assert isinstance(layer, VisionLayer)
    described = library.VisionLayer()
    for name in ("qkv", "out", "fc1", "fc2"):
        linear = getattr(layer, name)
        setattr(described, name, library.float_weight(linear.weight))
        setattr(described, f"{name}_bias", linear.bias.data_ptr())
    for name in ("norm1", "norm2"):
        norm = getattr(layer, name)
        setattr(described, f"{name}_weight", norm.weight.data_ptr())
        setattr(described, f"{name}_bias", norm.bias.data_ptr())
    return described
