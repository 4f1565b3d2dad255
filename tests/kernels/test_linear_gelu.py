"""linear_gelu by its kernels, against float64 arithmetic on the same inputs."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from llava_kernels import linear_gelu
from llava_kernels.linear_gelu import linear_gelu_reference

pytestmark = pytest.mark.usefixtures("triton_path")
MODULE = importlib.import_module("llava_kernels.linear_gelu")  # the package's attribute of this name is the op
# Blocks so small that a few rows make many tiles, in groups of which the last is not full.
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 2, "num_stages": 2}
# (shape of x, D): one element, odd, several tiles, nothing
SIZES = [((1, 1), 1), ((3, 7, 33), 50), ((2, 36, 40), 72), ((64,), 40), ((0, 5, 8), 6), ((2, 2, 5, 16), 18)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["table", "small"])
def blocks(request, monkeypatch):
    """The launchers' own block sizes, and small ones."""
    if request.param == "small":
        monkeypatch.setattr(MODULE, "blocks_for", lambda op, device, size: dict(SMALL))


def make(
    shape: tuple[int, ...], d: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, gradient of the output."""
    kw = {"dtype": dtype, "device": device}
    x, weight = torch.randn(shape, **kw), torch.randn(d, shape[-1], **kw) / shape[-1] ** 0.5
    return x, weight, torch.randn(d, **kw), torch.randn(*shape[:-1], d, **kw)


def normal_below(y: Tensor) -> Tensor:
    return torch.special.erfc(-y / 2**0.5) / 2


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = x.double() @ weight.double().T + bias.double()
    return y * normal_below(y)


def exact_gradients(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    rows, weight = x.double().reshape(-1, x.shape[-1]), weight.double()
    y = rows @ weight.T + bias.double()
    slope = normal_below(y) + y * (-y.square() / 2).exp() / (2 * torch.pi) ** 0.5
    d_y = grad.double().reshape(y.shape) * slope
    return [(d_y @ weight).reshape(x.shape), d_y.T @ rows, d_y.sum(0)]


def gradients(function, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(function(*inputs), inputs, grad)


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor, times: int) -> None:
    """At most ``times`` torch's own error, plus one rounding of 1 or of the largest value, where torch is exact."""
    assert mine.dtype == torchs.dtype
    assert mine.shape == torchs.shape == exact.shape
    if mine.numel() == 0:
        return
    error, torch_error = ((a.double() - exact).abs().max().item() for a in (mine, torchs))
    assert error <= times * torch_error + torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


@pytest.mark.parametrize(("shape", "d"), SIZES)
def test_forward(shape, d, dtype, device, blocks):
    x, weight, bias, _ = make(shape, d, dtype, device)
    out = linear_gelu(x, weight, bias)
    assert_as_good_as_torch(out, linear_gelu_reference(x, weight, bias), exact(x, weight, bias), 2)


@pytest.mark.parametrize(("shape", "d"), SIZES)
def test_gradients(shape, d, dtype, device, blocks):
    inputs = make(shape, d, dtype, device)
    mine, torchs = (gradients(f, *inputs) for f in (linear_gelu, linear_gelu_reference))
    for a, b, expected in zip(mine, torchs, exact_gradients(*inputs), strict=True):
        assert_as_good_as_torch(a, b, expected, 3)


@pytest.mark.parametrize("layout", ["class token", "patches first", "columns apart", "four dimensions"])
def test_layouts_of_x(layout, device):
    x = {
        "class token": torch.randn(3, 6, 20)[:, 1:],
        "patches first": torch.randn(5, 3, 20).transpose(0, 1),
        "columns apart": torch.randn(3, 5, 40)[..., ::2],
        "four dimensions": torch.randn(1, 3, 6, 20)[:, :, 1:],
    }[layout].to(device)
    _, weight, bias, grad = make(tuple(x.shape), 18, torch.float32, device)
    torch.testing.assert_close(linear_gelu(x, weight, bias).double(), exact(x, weight, bias), atol=1e-5, rtol=1e-5)
    for a, expected in zip(
        gradients(linear_gelu, x, weight, bias, grad), exact_gradients(x, weight, bias, grad), strict=True
    ):
        torch.testing.assert_close(a.double(), expected, atol=1e-5, rtol=1e-5)


def test_features_without_class_token_are_not_copied(device):
    x = torch.randn(3, 6, 8, device=device)[:, 1:]
    rows, *steps = MODULE._rows_of(x)
    assert rows.data_ptr() == x.data_ptr()
    assert steps == [15, 5, 48, 8]


def test_strides_of_the_other_operands(device):
    x, weight, bias, _ = make((4, 20), 18, torch.float32, device)
    grad = torch.randn(1, 1, device=device).expand(4, 18)
    weight, bias = weight.t().contiguous().t(), torch.stack((bias, bias), 1)[:, 0]
    torch.testing.assert_close(linear_gelu(x, weight, bias).double(), exact(x, weight, bias), atol=1e-5, rtol=1e-5)
    for a, expected in zip(
        gradients(linear_gelu, x, weight, bias, grad), exact_gradients(x, weight, bias, grad), strict=True
    ):
        torch.testing.assert_close(a.double(), expected, atol=1e-5, rtol=1e-5)


def test_no_bias(device):
    x, weight, bias, grad = make((4, 20), 18, torch.float32, device)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    out = linear_gelu(*inputs, None)
    torch.testing.assert_close(out.double(), exact(x, weight, 0 * bias), atol=1e-5, rtol=1e-5)
    expected = exact_gradients(x.detach(), weight.detach(), 0 * bias, grad)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), expected, strict=False):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_far_from_zero(device):
    """Where erf is 1 and the density 0: the function is 0 or the argument itself, its slope 0 or 1."""
    x = torch.tensor([[-1e4], [-30.0], [30.0], [1e4]], device=device)
    one, none = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    assert linear_gelu(x, one, none).flatten().tolist() == [0, 0, 30, 1e4]
    d_x, _, d_bias = gradients(linear_gelu, x, one, none, torch.ones(4, 1, device=device))
    assert d_x.flatten().tolist() == [0, 0, 1, 1]
    assert d_bias.tolist() == [2]


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2), ()])
def test_only_what_is_trained_gets_a_gradient(trained, device):
    *inputs, grad = make((3, 8), 6, torch.float32, device)
    for i in trained:
        inputs[i].requires_grad_()
    out = linear_gelu(*inputs)
    assert (out.grad_fn is None) == (not trained)
    if not trained:
        return
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = linear_gelu(*inputs)
    assert saved == [t.data_ptr() for t in inputs]  # the inputs and nothing computed
    out.backward(grad)
    expected = exact_gradients(*(t.detach() for t in inputs), grad)
    assert [i for i, t in enumerate(inputs) if t.grad is not None] == list(trained)
    for i in trained:
        torch.testing.assert_close(inputs[i].grad.double(), expected[i], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
def test_gradients_are_the_slopes(device):
    """Finite differences: half steps of 0.01 leave an error of about 1e-5 from the curve and from rounding each."""
    *inputs, _ = make((2, 2), 3, torch.float32, device)
    assert torch.autograd.gradcheck(linear_gelu, [t.requires_grad_() for t in inputs], eps=1e-2, atol=1e-3, rtol=1e-3)


def test_opcheck(device):
    *inputs, grad = make((2, 3, 8), 6, torch.float32, device)
    ops = torch.ops.llava_kernels
    for with_bias in (False, True):
        torch.library.opcheck(ops.linear_gelu_backward, (grad, *inputs, with_bias))
    torch.library.opcheck(ops.linear_gelu, tuple(t.requires_grad_() for t in inputs))


def test_compiles(device):
    inputs = make((2, 3, 8), 6, torch.float32, device)
    mine = gradients(torch.compile(linear_gelu, backend="aot_eager"), *inputs)
    for a, b in zip(mine, gradients(linear_gelu, *inputs), strict=True):
        assert torch.equal(a, b)


def test_errors(device):
    x, weight, bias, _ = make((3, 8), 6, torch.float32, device)
    for wrong in ((x[:, 1:], weight, bias), (x, weight, bias[1:])):
        with pytest.raises(ValueError, match="does not fit"):
            linear_gelu(*wrong)
    with pytest.raises(ValueError, match="must be so too"):
        linear_gelu(x, weight.half(), bias)
    with pytest.raises(ValueError, match="float64"):
        linear_gelu(x.double(), weight.double(), bias.double())
