"""varlen_attention by torch's own torch.nn.attention.varlen, the flash-attention 2 that torch carries."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from llava_kernels.attention.backend import Backend, on_device, unfit_for_flash


def load() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def groups_heads(varlen_attn: Callable[..., Any]) -> bool:
    """torch 2.12 and later take fewer key heads than query heads; 2.11 does not."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    varlen_attn = load()
    ends, longest = on_device(seqlens, cu_seqlens, q.device), max(seqlens)
    group = q.shape[1] // k.shape[1]
    options = {}
    if group > 1 and groups_heads(varlen_attn):
        options["enable_gqa"] = True
    elif group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    window = (-1, 0) if causal else (-1, -1)  # how many tokens to the left and to the right are seen; -1 is all
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=window, **options)


TORCH_VARLEN = Backend(attend=attend, unfit=unfit_for_flash, load=load, install="pip install 'torch>=2.11'")
