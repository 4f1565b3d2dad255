"""swiglu by its kernels, against float64 arithmetic on the same inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_kernels import swiglu
from llava_kernels.swiglu import swiglu_reference

pytestmark = pytest.mark.usefixtures("triton_path")
# (..., 2F): one element, odd, even, two blocks a row with the second one partly filled.
SHAPES = [(1, 2), (5, 14), (2, 3, 66), (7, 256), (2, 2 * 1100), (64,)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def exact(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().tensor_split(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor, times: int) -> None:
    """At most ``times`` torch's own error, plus one rounding of 1 or of the largest value, where torch is exact."""
    assert mine.dtype == torchs.dtype
    assert mine.shape == torchs.shape
    error, torch_error = ((a.double() - exact.double()).abs().max().item() for a in (mine, torchs))
    assert error <= times * torch_error + torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


def gradient(function, gate_up: Tensor, d_out: Tensor) -> Tensor:
    gate_up = gate_up.detach().requires_grad_()
    out = function(gate_up)
    return torch.autograd.grad(out, gate_up, d_out.to(out.dtype))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype, device):
    gate_up = 3 * torch.randn(shape, dtype=dtype, device=device)
    out = swiglu(gate_up)
    assert out.is_contiguous()
    assert_as_good_as_torch(out, swiglu_reference(gate_up), exact(gate_up), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, dtype, device):
    gate_up = 3 * torch.randn(shape, dtype=dtype, device=device)
    d_out = torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype, device=device)
    mine, torchs = (gradient(f, gate_up, d_out) for f in (swiglu, swiglu_reference))
    assert_as_good_as_torch(mine, torchs, gradient(exact, gate_up.double(), d_out), 3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's remark; the interpreter goes on with inf
def test_far_from_zero(device):
    """Gates at which exp overflows: silu is 0 or the gate itself, and its slope 0 or 1."""
    gate_up = torch.tensor([[-1e4, -200.0, 200.0, 1e4] + [2.0] * 4], device=device)
    assert swiglu(gate_up).tolist() == [[0, 0, 400, 2e4]]
    assert gradient(swiglu, gate_up, torch.ones(1, 4, device=device)).tolist() == [[0, 0, 2, 2, 0, 0, 200, 1e4]]


@pytest.mark.parametrize("layout", ["row slice", "every other column", "transposed", "one gradient for all"])
def test_strides(layout, device):
    """Inputs and incoming gradients of any strides."""
    wide, square, d_out = (torch.randn(s, device=device) for s in ((6, 50), (24, 6), (6, 30)))
    gate_up, d_out = {
        "row slice": (wide[:, 3:27], d_out[:, 5:17]),
        "every other column": (wide[:, ::2][:, :24], d_out[:, ::2][:, :12]),
        "transposed": (square.t(), d_out.reshape(30, 6)[:12].t()),
        "one gradient for all": (wide[:, :24], d_out[:1, :1].expand(6, 12)),
    }[layout]
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up.contiguous()))
    mine = gradient(swiglu, gate_up, d_out)
    torch.testing.assert_close(mine, gradient(swiglu_reference, gate_up.contiguous(), d_out.contiguous()))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(shape, device):
    gate_up = torch.zeros(shape, device=device, requires_grad=True)
    out = swiglu(gate_up)
    out.sum().backward()
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert gate_up.grad.shape == shape


def test_keeps_its_input_alone_for_the_backward_pass(device):
    kept = []
    gate_up = torch.randn(4, 16, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate_up)
    assert kept == [gate_up.data_ptr()]


def test_gradient_by_finite_differences(device):
    gate_up = torch.randn(2, 6, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(swiglu, (gate_up,), eps=1e-2, atol=2e-3, rtol=2e-3)


def test_an_odd_size_is_refused(device):
    with pytest.raises(ValueError, match="no two halves"):
        swiglu(torch.zeros(2, 7, device=device))


def test_opcheck(device):
    gate_up = torch.randn(4, 16, device=device)
    torch.library.opcheck(torch.ops.llava_kernels.swiglu, (gate_up.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.llava_kernels.swiglu_backward, (torch.randn(4, 8, device=device), gate_up))


def test_compiled(device):
    gate_up, d_out = torch.randn(5, 12, device=device), torch.randn(5, 6, device=device)
    compiled = torch.compile(lambda x: swiglu(x) + 1, backend="aot_eager")
    torch.testing.assert_close(compiled(gate_up), swiglu_reference(gate_up) + 1)
    torch.testing.assert_close(gradient(compiled, gate_up, d_out), gradient(swiglu_reference, gate_up, d_out))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(device):
    gate_up = torch.randn(6, 128, device=device)
    swiglu(gate_up)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = swiglu(gate_up)
    gate_up.normal_()
    graph.replay()
    torch.testing.assert_close(out, swiglu_reference(gate_up))
