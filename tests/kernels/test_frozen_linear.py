"""frozen_linear against rounding to float8 written another way, in float64, and against torch's own float8 product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llava_kernels
from llava_kernels import freeze_fp8, frozen_linear
from llava_kernels.frozen_linear import round_rows

# (T, K, N): one row, few rows, more rows than columns, a row longer than the next power of two below it.
SHAPES = [(1, 16, 32), (5, 48, 16), (40, 32, 64), (3, 1040, 16)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "triton"])
def path(request, monkeypatch, device):
    """Both implementations; where Triton's interpreter runs, with torch's own rounding to float8 in it.

    Its own loses a carry: it rounds 31.5 to 16.
    """
    if request.param == "triton" and device.type == "cpu":
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter

        theirs = interpreter._convert_float

        def convert(data, source, target, rounding):
            if target != tl.float8e4nv:
                return theirs(data, source, target, rounding)
            codes = torch.from_numpy(np.array(data, np.float32)).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", convert)
    with llava_kernels.implementation(request.param):
        yield request.param


def rounded(x: Tensor) -> Tensor:
    """What float8 codes with one scale a row stand for: 4 significant bits, at least 2**-9 of the scale apart."""
    x = x.double()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-300) / 448
    _, exponent = torch.frexp(x / scale)
    step = torch.exp2((exponent - 4).clamp(min=-9).double())
    return torch.round(x / scale / step) * step * scale


def case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, K), W (N, K), dy (T, N); rows of very different sizes, and values of very different sizes in a row."""
    t, k, n = shape
    x = torch.randn(t, k, device=device) * torch.logspace(-3, 1, t, device=device)[:, None]
    weight = torch.randn(n, k, device=device) * torch.logspace(-1, 1, n, device=device)[:, None]
    return x.to(dtype), weight.to(dtype), (torch.randn(t, n, device=device) ** 3).to(dtype)


def both(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The product and x's gradient."""
    x = x.clone().requires_grad_()
    y = frozen_linear(x, freeze_fp8(weight))
    return y, torch.autograd.grad(y, x, dy)[0]


@pytest.fixture
def exact_dtype(device) -> torch.dtype:
    """On CUDA there is bfloat16 alone."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_rounded(shape, path, device, exact_dtype):
    x, _, _ = case(shape, exact_dtype, device)
    columns = torch.rand(shape[1], device=device) + 0.5
    for factors in (None, columns):
        codes, scale = round_rows(x, factors)
        expected = rounded(x if factors is None else x.float() * factors)
        # The compiled kernel's division may round a tie the other way.
        loose = 2.0**-3 if device.type == "cuda" and path == "triton" else 1e-6
        torch.testing.assert_close(codes.double() * scale.double()[:, None], expected, rtol=loose, atol=1e-12)
        assert (codes.float().abs().amax(1) == 448).all()  # the whole range: what is small keeps its bits


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_rounded_operands(shape, path, device, exact_dtype):
    x, weight, dy = case(shape, exact_dtype, device)
    y, _ = both(x, weight, dy)
    assert y.dtype == x.dtype
    close(y, rounded(x) @ rounded(weight).T, device)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_rounded_functions(shape, path, device, exact_dtype):
    """dy with the weight's scales in its columns, rounded, times the weight's codes."""
    x, weight, dy = case(shape, exact_dtype, device)
    _, dx = both(x, weight, dy)
    scale = weight.double().abs().amax(1) / 448
    close(dx, rounded(dy.double() * scale) @ (rounded(weight) / scale[:, None]), device)


def close(mine: Tensor, expected: Tensor, device: torch.device) -> None:
    size = expected.abs().amax(1, keepdim=True)
    torch.testing.assert_close(mine / size, expected / size, rtol=0, atol=1e-2 if device.type == "cuda" else 1e-5,
                               check_dtype=False)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_rounding_each_operand(shape, path, device, exact_dtype):
    """Half a unit in the last of 4 significant bits is 2**-4 of a value: beside the unrounded product in float64."""
    x, weight, dy = (a.double() for a in case(shape, exact_dtype, device))
    y, dx = both(x.to(exact_dtype), weight.to(exact_dtype), dy.to(exact_dtype))
    either = 2 * 2**-4 + 2**-8
    tiny = 2**-10 / 448 * 2  # of the largest of a row, where values are below the smallest normal number
    for mine, a, b in ((y, x, weight.T), (dx, dy, weight)):
        largest = a.abs().amax(1, keepdim=True) * b.abs().sum(0) + a.abs().sum(1, keepdim=True) * b.abs().amax()
        bound = either * (a.abs() @ b.abs()) + tiny * largest * 4
        assert ((mine.double() - a @ b).abs() <= bound + 2**-8 * (a @ b).abs()).all()
        typical = (mine.double() - a @ b).norm() / (a @ b).norm()
        assert 0.002 < typical < 0.05  # 2**-4 / sqrt(3) at most, less where errors cancel; 0 would be no rounding


def test_torchs_own_float8_product_agrees(device, exact_dtype):
    x, weight, dy = case((20, 64, 32), torch.bfloat16, device)
    y, _ = both(x, weight, dy)
    frozen, (codes, scale) = freeze_fp8(weight), round_rows(x)
    theirs = torch._scaled_mm(
        codes, frozen.codes.t(), scale_a=scale[:, None], scale_b=frozen.scale[None], out_dtype=torch.bfloat16
    )
    torch.testing.assert_close(y, theirs, rtol=2**-7, atol=1e-6)


def test_a_row_of_zeros(path, device, exact_dtype):
    x = torch.zeros(3, 32, device=device, dtype=exact_dtype)
    x[1] = 1
    weight = torch.zeros(16, 32, device=device, dtype=exact_dtype)
    weight[1] = 2
    y, dx = both(x, weight, torch.zeros(3, 16, device=device, dtype=exact_dtype))
    assert y[1, 1].item() == pytest.approx(64)
    assert y[1, 1] == y.abs().sum()
    assert dx.abs().sum() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_seen(bad, path, device, exact_dtype):
    x = torch.ones(3, 32, device=device, dtype=exact_dtype)
    x[1, 3] = bad
    y = frozen_linear(x, freeze_fp8(torch.ones(16, 32, device=device)))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_strides(path, device, exact_dtype):
    wide, weight = torch.randn(6, 100, device=device, dtype=exact_dtype), torch.randn(16, 32, device=device)
    frozen = freeze_fp8(weight)
    for x in (wide[:, 3:35], wide[:, ::3][:, :32], wide[:1, :32].expand(4, 32)):
        torch.testing.assert_close(frozen_linear(x, frozen), frozen_linear(x.contiguous(), frozen))
    x = wide[:, :32].clone().requires_grad_()
    frozen_linear(x, frozen).sum().backward()  # an incoming gradient that is one value seen everywhere
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_no_rows(path, device, exact_dtype):
    x = torch.zeros(0, 32, device=device, dtype=exact_dtype, requires_grad=True)
    y = frozen_linear(x, freeze_fp8(torch.ones(16, 32, device=device)))
    y.sum().backward()
    assert y.shape == (0, 16)
    assert x.grad.shape == (0, 32)


def test_keeps_the_weight_alone_for_the_backward_pass(device, exact_dtype):
    kept = []
    frozen = freeze_fp8(torch.ones(16, 32, device=device))
    x = torch.ones(4, 32, device=device, dtype=exact_dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        frozen_linear(x, frozen)
    assert kept == [frozen.transposed.data_ptr(), frozen.scale.data_ptr()]


def test_sizes_are_checked(device, exact_dtype):
    with pytest.raises(ValueError, match=r"\(16, 40\).*multiples of 16"):
        freeze_fp8(torch.zeros(16, 40))
    with pytest.raises(ValueError, match=r"\(2, 16\) does not fit.*\(16, 32\)"):
        frozen_linear(torch.zeros(2, 16), freeze_fp8(torch.zeros(16, 32)))


def test_opcheck(device, exact_dtype):
    x, weight, dy = case((4, 32, 16), exact_dtype, device)
    frozen = freeze_fp8(weight)
    arguments = (x.clone().requires_grad_(), frozen.codes, frozen.transposed, frozen.scale)
    # All but test_schema, which multiplies the arguments by a number: torch cannot, in float8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.llava_kernels.frozen_linear, arguments, test_utils=checks)
    arguments = (dy, frozen.transposed, frozen.scale)
    torch.library.opcheck(torch.ops.llava_kernels.frozen_linear_backward, arguments, test_utils=checks)


def test_compiled(device, exact_dtype):
    x, weight, dy = case((5, 32, 16), exact_dtype, device)
    frozen = freeze_fp8(weight)
    compiled = torch.compile(lambda x: frozen_linear(x, frozen) + 1, backend="aot_eager")
    x = x.clone().requires_grad_()
    torch.testing.assert_close(compiled(x), frozen_linear(x, frozen) + 1)
    (mine,) = torch.autograd.grad(compiled(x), x, dy)
    torch.testing.assert_close(mine, both(x.detach(), weight, dy)[1])
