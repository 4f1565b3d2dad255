"""The operations of a LLaVA model on packed tokens, one a file. Knows torch, nothing of llava_fast.

Every operation stands here as its definition in plain PyTorch. That definition is what runs on every device today:
there are no custom kernels yet.
"""

from llava_kernels.attention import varlen_attention
from llava_kernels.linear_cross_entropy import linear_cross_entropy
from llava_kernels.linear_gelu import linear_gelu
from llava_kernels.project_splice import project_splice
from llava_kernels.rms_norm import rms_norm
from llava_kernels.rope import rope
from llava_kernels.swiglu import swiglu

__all__ = [
    "linear_cross_entropy",
    "linear_gelu",
    "project_splice",
    "rms_norm",
    "rope",
    "swiglu",
    "varlen_attention",
]
