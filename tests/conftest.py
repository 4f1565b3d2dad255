"""Triton's interpreter stands in for a GPU: it must be asked for before anything imports llava_kernels."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
