"""linear: ``x W^T + b``, and on a CPU without 16-bit products the same through float32, a slice of W at a time."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 5  # up to here torch's 16-bit products, one row at a time, read the weight as fast as the memory gives it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, faster where torch multiplies 16-bit numbers in software.

    On such a CPU (x86 without AVX512-BF16 or AMX) more than a few rows are multiplied in float32, with the sums in
    float32 as everywhere; only rounding differs. With gradients, and everywhere else, it is torch's function.

    Args:
        x: (..., K).
        weight: (N, K) of x's dtype.
        bias: (N,) or None.

    Returns:
        (..., N) in x's dtype.
    """
    if not multiplies_in_software(x) or x.numel() <= FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return F.linear(x, weight, bias)
    out = linear_in_float32(x.reshape(-1, x.shape[-1]), weight)  # (M, N)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], -1)


def linear_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """(M, K) and (N, K) of 16-bit floats -> (M, N), multiplied and added up in float32. TorchScript can compile it."""
    step = max(64, 262144 // weight.size(1))  # 1 MiB of float32 weights at a time: they stay in the processor's cache
    rows = x.float()
    return torch.cat([F.linear(rows, some.float()).to(x.dtype) for some in weight.split(step)], dim=1)


def multiplies_in_software(x: Tensor) -> bool:
    """Whether x is of 16-bit floats, on a CPU that has no instructions for their products."""
    return x.device.type == "cpu" and x.dtype in HALF and not _has_half_products()


@cache
def _has_half_products() -> bool:
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, name)() for name in known if hasattr(torch.cpu, name))
