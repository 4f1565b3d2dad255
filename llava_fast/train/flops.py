"""Model FLOPs of a training step, and the peak rates of known cards."""

from __future__ import annotations

import numpy as np
import torch

from llava_fast.batch import PackedBatch
from llava_fast.config import ModelConfig

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def peak_of(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAK.items() if card in name), None)


def step_flops(config: ModelConfig, batch: PackedBatch, train_decoder: bool, adapters: int = 0) -> float:
    """Multiply-adds counted twice, of one forward and backward pass; see :func:`sample_flops`.

    ``adapters``: parameters of LoRA adapters, which are trained.
    """
    sizes = np.zeros((len(batch.seqlens), 3))
    sizes[:, 0] = batch.seqlens
    # Supervised tokens and images count the same in whichever of the samples they stand.
    images = batch.num_images if batch.pixel_values.dim() == 4 else 0  # features from a cache cost no tower
    sizes[:1, 1:] = batch.num_supervised, images
    return float(sample_flops(config, sizes, train_decoder).sum()) + 3 * 2 * adapters * batch.num_tokens


def sample_flops(config: ModelConfig, sizes: np.ndarray, train_decoder: bool) -> np.ndarray:
    """Operations of a forward and backward pass of each sample, (n,) float64; a multiply-add is two.

    The vision tower runs forward only. The decoder's backward pass computes input gradients, and weight gradients when
    it is trained. What follows attention in the last layer, and the head, count for supervised rows only. Recomputation
    is not counted.

    Args:
        config: of the model.
        sizes: (n, 3) tokens (image rows counted), supervised tokens and images of each sample.
        train_decoder: stage 2.
    """
    text, vision = config.text, config.vision
    width = text.num_attention_heads * text.head_dim
    qkv = text.hidden_size * (width + 2 * text.num_key_value_heads * text.head_dim)
    rest = text.hidden_size * width + 3 * text.hidden_size * text.intermediate_size
    layers = text.num_hidden_layers
    tokens, supervised, images = sizes.astype(np.float64).T
    linear = 2 * (layers * qkv + (layers - 1) * rest) * tokens
    linear += 2 * (rest + text.hidden_size * text.vocab_size) * supervised
    attention = 2 * width * tokens**2 * layers  # causal: half of all pairs
    projector = vision.hidden_size * text.hidden_size
    if config.projector == "mlp2x_gelu":
        projector += text.hidden_size**2
    seen = vision.num_patches + 1
    tower_layer = 2 * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size) * seen
    tower_layer += 4 * vision.hidden_size * seen**2
    picture = 3 * 2 * projector * config.tokens_per_image + tower_layer * config.vision_layers_run
    return (3 if train_decoder else 2) * linear + 3 * attention + picture * images
