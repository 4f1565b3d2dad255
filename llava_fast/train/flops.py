"""Model FLOPs of a training step, and the peak rates of known cards."""

from __future__ import annotations

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
    """Multiply-adds counted twice, of one forward and backward pass.

    The vision tower runs forward only. The decoder's backward pass computes input gradients, and weight gradients when
    it is trained. The head counts for supervised rows only. Recomputation is not counted. ``adapters``: parameters of
    LoRA adapters, which are trained.
    """
    text, vision = config.text, config.vision
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    layer = text.hidden_size * (heads + text.num_attention_heads) * text.head_dim
    layer += 3 * text.hidden_size * text.intermediate_size
    passes = 3 if train_decoder else 2
    linear = 2 * layer * text.num_hidden_layers * batch.num_tokens
    linear += 2 * text.hidden_size * text.vocab_size * batch.num_supervised
    trained = 3 * 2 * adapters * batch.num_tokens
    squares = sum(n * n for n in batch.seqlens)
    attention = 2 * text.num_attention_heads * text.head_dim * squares * text.num_hidden_layers  # causal: half
    rows = batch.image_rows.shape[0]
    projector = 2 * vision.hidden_size * text.hidden_size * rows
    if config.projector == "mlp2x_gelu":
        projector += 2 * text.hidden_size**2 * rows
    images = batch.num_images if batch.pixel_values.dim() == 4 else 0  # features from a cache cost no tower
    patches = images * (vision.num_patches + 1)
    tower_layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    tower = 2 * tower_layer * config.vision_layers_run * patches
    tower += 4 * vision.hidden_size * (vision.num_patches + 1) * patches * config.vision_layers_run
    return passes * linear + trained + 3 * attention + 3 * projector + tower
