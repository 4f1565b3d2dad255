"""Screen: a head's weights in 8 bits, and how far a logit can be from what they make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kernels import Int8Weight, dequantize_int8, quantize_int8

ROWS = 1024  # of the head that are in float32 at a time
# Activations have 15 bits and a sign in groups of 128: off by sqrt(128) / 65,534 of their norm, and a little more.
BY_CODES = 2e-4


@dataclass(frozen=True)
class Screen:
    """A step that wants the likeliest token alone reads these first, half of a bfloat16 head's bytes, and of the head
    only the rows whose logit may still be the largest: by Cauchy and Schwarz a logit is within ``error`` times the
    hidden state's norm of the one found here. What comes out is the head's own largest, not nearly so.

    Attributes:
        weight: (V, D).
        error: (V,) float32.
    """

    weight: Int8Weight
    error: Tensor

    @staticmethod
    @torch.no_grad()
    def of(head: Tensor) -> Screen:
        """head: (V, D) bfloat16 on the CPU."""
        words, scales, errors = [], [], []
        by_sums = 2 * (head.shape[1] + 64) * 2.0**-24  # of float32, in whichever order
        for start in range(0, len(head), ROWS):
            exact = head[start : start + ROWS].float()
            rounded = quantize_int8(exact)
            found = dequantize_int8(rounded)
            words.append(rounded.words)
            scales.append(rounded.scale)
            errors.append((exact - found).norm(dim=1) * 1.0001 + exact.norm(dim=1) * (BY_CODES + by_sums) * 1.01)
        return Screen(Int8Weight(torch.cat(words), torch.cat(scales), head.shape[1]), torch.cat(errors))
