"""What each stage trains."""

from __future__ import annotations

import torch

from llava_fast.model import Llava
from llava_fast.model.lora import lora_of


def freeze(model: Llava, stage: int) -> None:
    """Stage 1 trains the projector, stage 2 the projector and the decoder with its head; the tower never.

    Where the decoder has LoRA adapters, stage 2 trains these and the projector.
    """
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if stage == 2 and lora_of(model) is not None:
        for name, parameter in model.named_parameters():
            if name.endswith((".lora_A", ".lora_B")):
                parameter.requires_grad_(True)
    elif stage == 2:
        model.decoder.requires_grad_(True)
        if model.lm_head is not None:
            model.lm_head.requires_grad_(True)


def trained(model: Llava) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
