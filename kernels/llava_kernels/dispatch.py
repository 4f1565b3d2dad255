"""Which implementation of an op runs: its Triton kernel on a CUDA tensor; on a CPU the C library's code for a training
step's operations, where it was built, and the reference in plain PyTorch for the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

CHOICES = ("auto", "reference", "triton", "native")
Function = TypeVar("Function", bound=Callable[..., Any])
_forced: ContextVar[str | None] = ContextVar("llava_kernels_implementation", default=None)


def constant_under_compile(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which takes a second and a half."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_under_compile
def chosen() -> str:
    """One of :data:`CHOICES`: the innermost :func:`implementation`, else the variable LLAVA_KERNELS.

    torch.compile takes the choice of the moment in which it compiles.

    Raises:
        ValueError: LLAVA_KERNELS holds another word.
    """
    choice = _forced.get() or os.environ.get("LLAVA_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"LLAVA_KERNELS={choice!r} is not known; set it to one of {', '.join(CHOICES)}")
    return choice


@contextmanager
def implementation(choice: str) -> Iterator[None]:
    """Within the block, every op runs by ``choice``: "auto", "reference" (for debugging), "triton" or "native".

    "auto" and "native" decode and see on CPUs through the C library (:mod:`llava_kernels.library`) where it was built,
    and train with its norms, rotation, SwiGLU and attention (:mod:`llava_kernels.native_training`); so does
    project_splice and linear_gelu without gradients (:mod:`llava_kernels.native`) and sample of float32 logits
    (:mod:`llava_kernels.native_sample`), and pictures are prepared by it (:mod:`llava_kernels.image`). "native" takes
    it for linear_int8, linear_int4 and paged_attention too, without gradients; for all other operations both are
    "reference" on CPUs. "triton" on CPU tensors needs TRITON_INTERPRET=1 in the environment before the import.

    Raises:
        ValueError: ``choice`` is none of these.
    """
    if choice not in CHOICES:
        raise ValueError(f"implementation={choice!r} is not known; choose one of {', '.join(CHOICES)}")
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def use_triton(tensor: Tensor) -> bool:
    """Whether the op that is about to run on ``tensor`` runs its Triton kernel."""
    choice = chosen()
    return choice == "triton" or (choice == "auto" and tensor.is_cuda)
