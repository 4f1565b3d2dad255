"""Which dtype a checkpoint's weights are made in when the caller names none."""

from __future__ import annotations

import torch

from llava_fast.checkpoint.files import Entry
from llava_fast.errors import CheckpointError


def first_dtype(name: str | None, embedding: Entry | None) -> torch.dtype:
    """The dtype called ``name`` in config.json, else that of the token embeddings, else float32.

    Raises:
        CheckpointError: ``name`` is no floating-point dtype.
    """
    if name is not None:
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CheckpointError(f"config.json names the dtype {name!r}, which is no floating-point type of torch")
        return dtype
    if embedding is not None and embedding.dtype.is_floating_point:
        return embedding.dtype
    return torch.float32
