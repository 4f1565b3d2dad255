"""Screen: a head's weights in 8 bits, and how far a logit can be from what they make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kernels import Int8Weight, dequantize_int8, quantize_int8

ROWS = 256  # of the head that are in float32 at a time
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
        form = quantize_int8(head[:0].float())
        # Made first: between what each slice leaves behind they would hold on to the memory of all.
        words = torch.empty(len(head), *form.words.shape[1:], dtype=form.words.dtype)
        scale, error = torch.empty(len(head)), torch.empty(len(head))
        by_sums = 2 * (head.shape[1] + 64) * 2.0**-24  # of float32, in whichever order
        for start in range(0, len(head), ROWS):
            some = slice(start, start + ROWS)
            exact = head[some].float()
            rounded = quantize_int8(exact)
            found = dequantize_int8(rounded)
            words[some], scale[some] = rounded.words, rounded.scale
            error[some] = (exact - found).norm(dim=1) * 1.0001 + exact.norm(dim=1) * (BY_CODES + by_sums) * 1.01
        return Screen(Int8Weight(words, scale, head.shape[1]), error)
