"""Attention over packed sequences and against a paged cache. One back end a file."""

from llava_kernels.attention.paged import paged_attention
from llava_kernels.attention.rope_store_kv import rope_store_kv
from llava_kernels.attention.store_kv import store_kv
from llava_kernels.attention.varlen import FASTEST, IMPLEMENTATIONS, varlen_attention

__all__ = ["FASTEST", "IMPLEMENTATIONS", "paged_attention", "rope_store_kv", "store_kv", "varlen_attention"]
