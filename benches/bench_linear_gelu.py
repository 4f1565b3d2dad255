"""linear_gelu and its backward beside its definition and the bare product.

"gemm" is the product alone, on features that already lie in one run: what nothing that includes it can fall below.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.bench_project_splice import check, measure, name
from benches.memory_bound import GPU, noise
from llava_kernels import linear_gelu
from llava_kernels.linear_gelu import linear_gelu_reference

# Images, patches, C, D: LLaVA-1.5 7B and 13B on a GPU.
SHAPES = [(16, 576, 1024, 4096), (16, 576, 1024, 5120), (1, 576, 1024, 4096)] if GPU else [(4, 64, 128, 256)]
OPS = {"ours": linear_gelu, "eager": linear_gelu_reference}


def make(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with the class token skipped, weight, bias, gradient of the output."""
    images, patches, c, d = shape
    torch.manual_seed(0)
    weight, bias = (noise(d, c) / c**0.5).requires_grad_(), noise(d).requires_grad_()
    return noise(images, 1 + patches, c)[:, 1:], weight, bias, noise(images, patches, d)


def forward(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    if impl == "gemm":
        x = x.contiguous()
        return torch.no_grad()(lambda: F.linear(x, weight, bias))
    return torch.no_grad()(lambda: OPS[impl](x, weight, bias))


def backward(impl: str, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    out = OPS[impl](x, weight, bias)
    return lambda: torch.autograd.grad(out, (weight, bias), grad, retain_graph=True)


def product(shape: tuple[int, ...]) -> int:
    images, patches, c, d = shape
    return 2 * images * patches * c * d


@pytest.mark.parametrize("impl", ["ours", "eager", "gemm"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_forward(benchmark, shape, impl):
    *inputs, _ = make(shape)
    work, expected = forward(impl, *inputs), forward("eager", *inputs)()
    check(F.gelu(work()) if impl == "gemm" else work(), expected)
    benchmark.group = f"linear_gelu, {name(shape)}"
    measure(benchmark, work, product(shape), shape)


@pytest.mark.parametrize("impl", ["ours", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_backward(benchmark, shape, impl):
    """Gradients of weight and bias: the vision tower is frozen. Ours computes the forward's product again."""
    inputs = make(shape)
    work = backward(impl, *inputs)
    for mine, expected in zip(work(), backward("eager", *inputs)(), strict=True):
        check(mine, expected)
    benchmark.group = f"linear_gelu backward, {name(shape)}"
    measure(benchmark, work, product(shape), shape)
