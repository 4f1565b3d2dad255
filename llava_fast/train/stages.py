"""What each stage trains."""

from __future__ import annotations

import torch

from llava_fast.model import Llava


def freeze(model: Llava, stage: int) -> None:
    """Stage 1 trains the projector, stage 2 the projector and the decoder with its head; the tower never."""
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if stage == 2:
        model.decoder.requires_grad_(True)
        if model.lm_head is not None:
            model.lm_head.requires_grad_(True)


def trained(model: Llava) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
