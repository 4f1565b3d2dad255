"""rms_norm and add_rms_norm by their kernels, against float64 arithmetic on the same inputs."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from llava_kernels import add_rms_norm, rms_norm
from llava_kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

pytestmark = pytest.mark.usefixtures("triton_path")
EPS = 1e-5
# One element, odd, even, several rows a program, programs that take several groups of rows, one row a program.
SHAPES = [(1, 1), (1, 64), (5, 7), (2, 3, 33), (75, 24), (4, 2500)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight.double()


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor, times: int) -> None:
    """At most ``times`` torch's own error, plus one rounding of 1 or of the largest value.

    That floor is for where torch is exact by chance; a gradient near 0 is a difference of terms near 1.
    """
    assert mine.dtype == torchs.dtype
    assert mine.shape == torchs.shape
    error, torch_error = ((a.double() - exact.double()).abs().max().item() for a in (mine, torchs))
    assert error <= times * torch_error + torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


def gradients(function, inputs: tuple[Tensor, ...], coefficients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of the outputs' sum weighted by ``coefficients``."""
    inputs = tuple(x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs)
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(out, inputs, tuple(c.to(o.dtype) for c, o in zip(coefficients, out, strict=True)))


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, device):
    x, weight = (torch.randn(s, dtype=dtype, device=device) for s in (shape, shape[-1]))
    out = rms_norm(x, weight, EPS)
    assert out.is_contiguous()
    assert_as_good_as_torch(out, rms_norm_reference(x, weight, EPS), exact(x, weight), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_gradients(shape, dtype, device):
    x, weight, d = (torch.randn(s, dtype=dtype, device=device) for s in (shape, shape[-1], shape))
    mine = gradients(lambda x, w: rms_norm(x, w, EPS), (x, weight), (d,))
    torchs = gradients(lambda x, w: rms_norm_reference(x, w, EPS), (x, weight), (d,))
    true = gradients(exact, (x.double(), weight.double()), (d,))
    for a, b, c in zip(mine, torchs, true, strict=True):
        assert_as_good_as_torch(a, b, c, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype, device):
    x, residual, weight = (torch.randn(s, dtype=dtype, device=device) for s in (shape, shape, shape[-1]))
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert_as_good_as_torch(normed, rms_norm_reference(total, weight, EPS), exact(total, weight), 2)


@pytest.mark.parametrize("used", ["both", "normed", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_gradients(shape, dtype, device, used):
    """The gradients of the norm and of the sum arrive at both terms together; either output may be unused."""
    x, residual, weight = (torch.randn(s, dtype=dtype, device=device) for s in (shape, shape, shape[-1]))
    d = tuple(torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    keep = {"both": slice(0, 2), "normed": slice(0, 1), "sum": slice(1, 2)}[used]

    def run(op):
        inputs = [t.detach().clone().requires_grad_() for t in (x, residual, weight)]
        outputs = op(*inputs)[keep]
        found = torch.autograd.grad(outputs, inputs, [g.to(outputs[0].dtype) for g in d[keep]], allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]

    def in_float64(x, residual, weight):
        # From the rounded sum on, which is what both implementations norm.
        total = x.double() + residual.double()
        total = total + ((x + residual).double() - total).detach()
        return exact(total, weight), total

    mine = run(lambda *t: add_rms_norm(*t, EPS))
    torchs = run(lambda *t: add_rms_norm_reference(*t, EPS))
    true = run(in_float64)
    assert torch.equal(mine[0], mine[1])
    for a, b, c in zip(mine, torchs, true, strict=True):
        assert_as_good_as_torch(a, b, c.to(torch.float64), 3)


def test_rounds_before_the_weight_as_llama_does(device):
    """Where the reference rounds twice, so does the kernel: almost no element may differ."""
    x, weight = (torch.randn(s, dtype=torch.float16, device=device) for s in ((40, 96), (96,)))
    expected = rms_norm_reference(x, weight, EPS)
    rounded_once = rms_norm_reference(x.float(), weight.float(), EPS).half()
    assert differing(rms_norm(x, weight, EPS), expected) < 0.01 < differing(rounded_once, expected)


def test_norms_the_rounded_sum(device):
    """What the next layer gets, not the sum in float32."""
    x, residual, weight = (torch.randn(s, dtype=torch.float16, device=device) for s in ((40, 96), (40, 96), (96,)))
    expected = rms_norm_reference(x + residual, weight, EPS)
    not_rounded = rms_norm_reference((x.double() + residual.double()).float(), torch.ones_like(weight).float(), EPS)
    not_rounded = not_rounded.half() * weight
    assert differing(add_rms_norm(x, residual, weight, EPS)[0], expected) < 0.01 < differing(not_rounded, expected)


def differing(a: Tensor, b: Tensor) -> float:
    """The share of elements that are not the same."""
    return (a != b).float().mean().item()


@pytest.mark.parametrize("layout", ["row slice", "every other column", "transposed", "expanded"])
def test_strides(layout, device):
    """Inputs and incoming gradients of any strides; whatever lies between the rows is neither read nor written."""
    wide, square = torch.randn(6, 50, device=device), torch.randn(24, 6, device=device)
    views = {
        "row slice": lambda t, s: t[:, 3:27],
        "every other column": lambda t, s: t[:, ::2][:, :24],
        "transposed": lambda t, s: s.t(),
        "expanded": lambda t, s: t[:1, :24].expand(6, 24),
    }
    x, d = views[layout](wide, square), views[layout](torch.cat([wide.flip(0), wide], 1), square.flip(0))
    weight = torch.randn(48, device=device)[::2]
    compact, residual = x.contiguous(), d.contiguous()
    torch.testing.assert_close(rms_norm(x, weight, EPS), rms_norm_reference(compact, weight, EPS))
    for mine, expected in zip(
        add_rms_norm(x, d, weight, EPS), add_rms_norm_reference(compact, residual, weight, EPS), strict=True
    ):
        torch.testing.assert_close(mine, expected)
    arguments = (weight, compact.square().mean(-1).add(EPS).rsqrt(), True, True)
    mine = torch.ops.llava_kernels.rms_norm_backward(d, x, x, *arguments)
    expected = torch.ops.llava_kernels.rms_norm_backward(residual, compact, compact, *arguments)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, device):
    x, residual = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(8, device=device, requires_grad=True)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    (rms_norm(x, weight, EPS).sum() + normed.sum() + total.sum()).backward()
    assert normed.shape == total.shape == x.grad.shape == shape
    assert not weight.grad.any()


def test_zeros_stay_zeros_with_a_finite_gradient(device):
    x = torch.zeros(3, 8, device=device, requires_grad=True)
    out = rms_norm(x, torch.ones(8, device=device), EPS)
    out.backward(torch.randn_like(out))
    assert not out.any()
    assert x.grad.isfinite().all()


def test_float32_weight_on_half_precision_rows(device):
    """Trained weights may be kept in float32; the result keeps x's dtype all the same."""
    x, weight = torch.randn(5, 24, dtype=torch.float16, device=device), torch.randn(24, device=device)
    x.requires_grad_()
    weight.requires_grad_()
    out = rms_norm(x, weight, EPS)
    assert_as_good_as_torch(out, rms_norm_reference(x, weight, EPS), exact(x, weight), 2)
    out.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm])
@pytest.mark.parametrize("trained", ["x", "weight"])
def test_nothing_is_computed_for_what_is_frozen(op, trained, device, monkeypatch):
    module = importlib.import_module("llava_kernels.rms_norm")
    asked, returned = [], []
    backward = module._backward

    def spy(*arguments):
        asked.append(arguments[-2:])
        returned.append([t.numel() for t in backward(*arguments)])
        return backward(*arguments)

    monkeypatch.setattr(module, "_backward", spy)
    x = torch.randn(5, 8, device=device, requires_grad=trained == "x")
    weight = torch.randn(8, device=device, requires_grad=trained == "weight")
    out = op(x, weight, EPS) if op is rms_norm else op(x, torch.randn_like(x), weight, EPS)[0]
    expected = gradients(exact, (x, weight), (torch.ones_like(out),))
    out.sum().backward()
    assert asked == [(trained == "x", trained == "weight")]
    assert returned == [[40, 0] if trained == "x" else [0, 8]]
    if op is rms_norm:
        torch.testing.assert_close(*((x.grad, expected[0]) if trained == "x" else (weight.grad, expected[1])))


def test_the_weights_gradient_is_the_same_in_every_run(device):
    x, weight, d = (torch.randn(s, device=device) for s in ((70, 24), (24,), (70, 24)))
    runs = [gradients(lambda x, w: rms_norm(x, w, EPS), (x, weight), (d,))[1] for _ in range(2)]
    assert torch.equal(*runs)


def test_gradients_by_finite_differences(device):
    x, residual, weight = (torch.randn(s, device=device, requires_grad=True) for s in ((3, 4), (3, 4), (4,)))
    tolerances = {"eps": 1e-2, "atol": 2e-3, "rtol": 2e-3}  # float32: steps wide enough to rise above rounding
    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 0.1), (x, weight), **tolerances)
        assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, 0.1), (x, residual, weight), **tolerances)


def test_wrong_shapes_are_refused(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"weight is \(7,\).* needs \(8,\)"):
        rms_norm(x, x.new_zeros(7), EPS)
    with pytest.raises(ValueError, match="must agree"):
        add_rms_norm(x, x[:1], x.new_zeros(8), EPS)
    with pytest.raises(ValueError, match="must agree"):
        add_rms_norm(x, x.half(), x.new_zeros(8), EPS)


def test_opcheck(device):
    x, residual, weight = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 8), (4, 8), (8,)))
    ops = torch.ops.llava_kernels
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS))
    torch.library.opcheck(ops.add_rms_norm, (x, residual, weight, EPS))
    x, residual, weight = (t.detach() for t in (x, residual, weight))
    for further, needs in ((None, (True, False)), (residual, (True, True))):
        torch.library.opcheck(ops.rms_norm_backward, (x, further, x, weight, x[:, 0].abs(), *needs))


def test_compiled(device):
    def step(x, residual, weight):
        normed, total = add_rms_norm(x, residual, weight, EPS)
        return rms_norm(normed, weight, EPS) + total

    inputs = tuple(torch.randn(s, device=device) for s in ((6, 8), (6, 8), (8,)))
    d = (torch.randn(6, 8, device=device),)
    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
    for a, b in zip(gradients(compiled, inputs, d), gradients(step, inputs, d), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(device):
    x, weight = torch.randn(6, 128, device=device), torch.randn(128, device=device)
    rms_norm(x, weight, EPS)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rms_norm(x, weight, EPS)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(out, rms_norm_reference(x, weight, EPS))
