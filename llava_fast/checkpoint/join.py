"""Where stage 1 starts: a CLIP directory and a LLaMA directory joined by a fresh projector."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from llava_fast.checkpoint.clip import clip_source, read_clip_config
from llava_fast.checkpoint.dtypes import first_dtype
from llava_fast.checkpoint.llama import llama_source, read_llama_config
from llava_fast.checkpoint.names import EMBEDDING, fill
from llava_fast.checkpoint.projector import load_projector
from llava_fast.config import ModelConfig
from llava_fast.model import Llava


def join(
    clip_dir: Path | str,
    llama_dir: Path | str,
    *,
    projector: str = "linear",
    select_layer: int = -2,
    select_feature: str = "patch",
    image_aspect: str = "square",
    template: str = "v1",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    projector_weights: Path | str | None = None,
    attention: str = "auto",
) -> Llava:
    """A LLaVA model from its parts.

    Args:
        clip_dir: a CLIPModel or CLIPVisionModel directory.
        llama_dir: a LLaMA or Vicuna directory.
        projector: "linear" or "mlp2x_gelu".
        select_layer: which hidden state of the tower is the feature.
        select_feature: "patch" or "cls_patch".
        image_aspect: "square" or "pad".
        template: conversation template to train with.
        device: default the CPU.
        dtype: default the LLaMA checkpoint's own.
        seed: of the projector's random weights, the same on every device.
        projector_weights: a projector file to take instead of random weights.
        attention: as for :class:`Llava`.

    Raises:
        CheckpointError: a directory that is not what it should be, tensors that do not fit.
        ConfigError: an unknown name, sizes that do not fit together.
    """
    clip_dir, llama_dir = Path(clip_dir), Path(llama_dir)
    text, named_dtype = read_llama_config(llama_dir)
    config = ModelConfig(
        vision=read_clip_config(clip_dir),
        text=text,
        projector=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        image_aspect=image_aspect,
        template=template,
        dtype=named_dtype,
    )
    llama = llama_source(llama_dir, tied=text.tie_word_embeddings)
    dtype = dtype or first_dtype(named_dtype, llama.entries.get(EMBEDDING))
    model = Llava(config, device=device, dtype=dtype, seed=None, attention=attention)
    fill(model, [clip_source(clip_dir)], where=clip_dir, only="vision_tower.")
    fill(model, [llama], where=llama_dir, only="language_model.")
    init_projector(model, seed)
    if projector_weights is not None:
        load_projector(model, projector_weights)
    return model


@torch.no_grad()
def init_projector(model: Llava, seed: int) -> None:
    """Fill the projector's weights from U(-1/sqrt(n), 1/sqrt(n)), n their input width, and its biases with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.projector.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        else:
            bound = 1 / math.sqrt(weight.shape[1])
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
