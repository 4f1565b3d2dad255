"""The operations of a LLaVA model on packed tokens, one a file. Knows torch and triton, nothing of llava_fast.

Each file holds an operation whole: its definition in plain PyTorch, which is also what runs on a CPU, and the Triton
kernels that run on CUDA. :func:`implementation` or the environment variable LLAVA_KERNELS forces either. The kernels
were tested in Triton's interpreter and compiled for sm_80 and sm_90; none of them has run on a GPU yet.
"""

from llava_kernels.attention import paged_attention, rope_store_kv, store_kv, varlen_attention
from llava_kernels.dispatch import implementation
from llava_kernels.frozen_linear import FrozenWeight, freeze_fp8, frozen_linear
from llava_kernels.linear import linear
from llava_kernels.linear_cross_entropy import linear_cross_entropy
from llava_kernels.linear_gelu import linear_gelu
from llava_kernels.project_splice import project_splice
from llava_kernels.quantized_linear import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    linear_fp8,
    linear_int4,
    linear_int8,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from llava_kernels.rms_norm import add_rms_norm, rms_norm
from llava_kernels.rope import rope, rope_
from llava_kernels.sample import sample
from llava_kernels.swiglu import swiglu

__all__ = [
    "Fp8Weight",
    "FrozenWeight",
    "Int4Weight",
    "Int8Weight",
    "add_rms_norm",
    "dequantize_fp8",
    "dequantize_int4",
    "dequantize_int8",
    "freeze_fp8",
    "frozen_linear",
    "implementation",
    "linear",
    "linear_cross_entropy",
    "linear_fp8",
    "linear_gelu",
    "linear_int4",
    "linear_int8",
    "paged_attention",
    "project_splice",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "rope",
    "rope_",
    "rope_store_kv",
    "sample",
    "store_kv",
    "swiglu",
    "varlen_attention",
]
