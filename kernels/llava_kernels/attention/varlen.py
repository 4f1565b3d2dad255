"""varlen_attention: attention inside each of the sequences that lie end to end in a packed batch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_kernels.attention.backend import Backend
from llava_kernels.attention.flash_attn import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4
from llava_kernels.attention.native_varlen import NATIVE
from llava_kernels.attention.reference import REFERENCE, SDPA
from llava_kernels.attention.torch_varlen import TORCH_VARLEN
from llava_kernels.attention.triton_varlen import TRITON
from llava_kernels.attention.xformers import XFORMERS
from llava_kernels.dispatch import chosen, constant_under_compile

IMPLEMENTATIONS: dict[str, Backend] = {
    "reference": REFERENCE,
    "sdpa": SDPA,
    "flash-attn": FLASH_ATTN_2,
    "flash-attn-3": FLASH_ATTN_3,
    "flash-attn-4": FLASH_ATTN_4,
    "xformers": XFORMERS,
    "torch-varlen": TORCH_VARLEN,
    "triton": TRITON,
    "native": NATIVE,
}
# Fastest first on a GPU, by figures that others published for training; this package has measured none of them.
FASTEST = ("flash-attn-3", "flash-attn-4", "flash-attn", "torch-varlen", "xformers", "triton", "sdpa")


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Sequence[int],
    *,
    causal: bool = True,
    implementation: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v within each sequence, never across a boundary.

    Args:
        q: (T, heads, head_dim).
        k, v: (T, kv_heads, head_dim); heads is a multiple of kv_heads (grouped-query attention).
        seqlens: lengths of the sequences, on the host; their sum is T. Some may be 0.
        causal: a token sees itself and what comes before it.
        implementation: a name in IMPLEMENTATIONS, or "auto": what :func:`choose` takes.
        cu_seqlens: (S+1,) int32 on the device, where each sequence starts, then T. Copied from ``seqlens`` when a back
            end wants it and it is not given: once a layer, so a model should give it.

    Returns:
        (T, heads, head_dim).

    Raises:
        ImportError: the implementation is not installed; the message says how to install it.
        ValueError: the shapes do not fit together, the implementation is not known or cannot run this dtype, head size
            or device.
    """
    lengths = list(seqlens)
    _check(q, k, v, lengths, cu_seqlens)
    if not q.shape[0]:
        return REFERENCE.attend(q, k, v, [0], None, causal)  # nothing to compute; keeps the gradients' graph
    if 0 in lengths:  # not every library takes empty sequences
        lengths, cu_seqlens = [n for n in lengths if n], None
    name = choose(implementation, q.device, q.dtype, q.shape[-1])
    return IMPLEMENTATIONS[name].attend(q, k, v, lengths, cu_seqlens, causal)


@constant_under_compile
def choose(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the back end that runs.

    "auto" is what :func:`llava_kernels.implementation` or LLAVA_KERNELS forces on every op, else the environment
    variable LLAVA_ATTENTION, else the fastest that is installed and fits; on a CPU "native" where the C library was
    built, else "sdpa".

    Raises:
        ImportError, ValueError: as :func:`varlen_attention`.
    """
    name = implementation
    if name == "auto":
        name = chosen()
    if name == "auto":
        name = os.environ.get("LLAVA_ATTENTION", "auto")
    if name == "auto":
        order = ("native", "sdpa") if device.type == "cpu" else FASTEST
        return next(name for name in order if _runs(name, device, dtype, head_dim))
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention={name!r} is not known; choose auto, {', '.join(IMPLEMENTATIONS)}")
    backend = IMPLEMENTATIONS[name]
    if why := backend.missing():
        raise ImportError(f"attention={name!r} is not installed ({why}); install it with: {backend.install}")
    if why := backend.unfit(device, dtype, head_dim):
        raise ValueError(f"attention={name!r} {why}")
    return name


def _runs(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    backend = IMPLEMENTATIONS[name]
    return backend.unfit(device, dtype, head_dim) is None and backend.missing() is None


def _check(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int], cu_seqlens: Tensor | None) -> None:
    tokens, heads, head_dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2]) != (tokens, head_dim) or heads % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together: k and v are "
            f"(T, kv_heads, head_dim) and q's heads a multiple of kv_heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError("q, k and v must have one dtype and lie on one device")
    if sum(seqlens) != tokens or any(n < 0 for n in seqlens):
        raise ValueError(f"seqlens add up to {sum(seqlens)}, but q has {tokens} tokens")
    if cu_seqlens is not None and (
        cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device or cu_seqlens.shape != (len(seqlens) + 1,)
    ):
        raise ValueError(f"cu_seqlens must be ({len(seqlens) + 1},) int32 on {q.device}")
