"""Triton's interpreter stands in for a GPU: it must be asked for before anything imports llava_kernels."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that all use every core would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that a test starts
    torch.set_num_threads(1)
