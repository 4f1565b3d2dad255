"""varlen_attention by the flash-attention packages (Dao, arXiv 2307.08691; Shah et al., arXiv 2407.08608)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_kernels.attention.backend import Backend, on_device, unfit_for_flash


def load_2() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def load_3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def load_4() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def _attend(
    load: Callable[[], Callable[..., Any]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Sequence[int],
    cu_seqlens: Tensor | None,
    causal: bool,
) -> Tensor:
    ends, longest = on_device(seqlens, cu_seqlens, q.device), max(seqlens)
    out = load()(
        q,
        k,
        v,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=causal,
    )
    return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp with it


def _unfit_3(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return unfit_for_flash(device, dtype, head_dim, cards=(90,))


def _unfit_4(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return unfit_for_flash(device, dtype, head_dim, cards=(90, 100, 110), largest=128)


FLASH_ATTN_2 = Backend(
    attend=partial(_attend, load_2), unfit=unfit_for_flash, load=load_2, install="pip install 'llava-fast[flash-attn]'"
)
FLASH_ATTN_3 = Backend(
    attend=partial(_attend, load_3),
    unfit=_unfit_3,
    load=load_3,
    install="python setup.py install in the folder hopper of github.com/Dao-AILab/flash-attention",
)
FLASH_ATTN_4 = Backend(attend=partial(_attend, load_4), unfit=_unfit_4, load=load_4, install="pip install flash-attn-4")
