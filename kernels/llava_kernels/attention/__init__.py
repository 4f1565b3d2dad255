"""Attention over packed sequences. One back end a file."""

from llava_kernels.attention.varlen import IMPLEMENTATIONS, varlen_attention

__all__ = ["IMPLEMENTATIONS", "varlen_attention"]
