"""rope and rope_ by their kernel, against complex float64 arithmetic on the same inputs."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from llava_kernels import rope, rope_
from llava_kernels.rope import rope_reference

pytestmark = pytest.mark.usefixtures("triton_path")
# (tokens, heads, head_dim): one pair, odd counts, the head sizes in use, more heads than a program takes at once with
# their rest partly filled, more tokens than heads are shared between programs for.
SHAPES = [(1, 1, 2), (5, 3, 6), (9, 2, 64), (3, 5, 80), (2, 19, 128), (300, 2, 10)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def angles(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of unordered, repeated positions; scaled, as yarn scales them."""
    positions = torch.randint(0, max(2, tokens // 2), (tokens, 1), device=device)
    turned = positions * 100.0 ** -torch.linspace(0, 1, head_dim // 2, device=device)
    return 1.25 * turned.cos(), 1.25 * turned.sin()


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.double().tensor_split(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor, times: int) -> None:
    """At most ``times`` torch's own error, plus one rounding of 1 or of the largest value, where torch is exact."""
    assert mine.dtype == torchs.dtype
    assert mine.shape == torchs.shape
    error, torch_error = ((a.double() - exact.double()).abs().max().item() for a in (mine, torchs))
    assert error <= times * torch_error + torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


def gradient(function, x: Tensor, cos: Tensor, sin: Tensor, d_out: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    out = function(x, cos, sin)
    return torch.autograd.grad(out, x, d_out.to(out.dtype))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_rope(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    cos, sin = angles(shape[0], shape[2], device)
    out = rope(x, cos, sin)
    assert out.is_contiguous()
    assert_as_good_as_torch(out, rope_reference(x, cos, sin), exact(x, cos, sin), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, dtype, device):
    x, d_out = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    cos, sin = angles(shape[0], shape[2], device)
    mine, torchs = (gradient(f, x, cos, sin, d_out) for f in (rope, rope_reference))
    assert_as_good_as_torch(mine, torchs, gradient(exact, x.double(), cos, sin, d_out), 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rope_in_place(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    cos, sin = angles(shape[0], shape[2], device)
    expected = rope(x, cos, sin)
    assert rope_(x, cos, sin) is x
    assert torch.equal(x, expected)


def test_one_program_for_all_heads_of_its_tokens(device, monkeypatch):
    """As with many tokens: several rounds of heads, the last one partly filled."""
    blocks = {"pairs": 16, "shares": 1, "num_warps": 4}
    monkeypatch.setattr(importlib.import_module("llava_kernels.rope"), "blocks_for", lambda *_: dict(blocks))
    x, (cos, sin) = torch.randn(3, 5, 10, device=device), angles(3, 10, device)
    torch.testing.assert_close(rope(x, cos, sin), rope_reference(x, cos, sin))


def test_a_slice_of_the_merged_product(device):
    """Query and key heads are turned where they lie; the value heads beside them stay as they are."""
    heads, kv_heads, head_dim = 4, 2, 8
    qkv = torch.randn(7, (heads + 2 * kv_heads) * head_dim, device=device)
    before = qkv.clone()
    merged = qkv.unflatten(-1, (-1, head_dim))
    qk, v = merged.split((heads + kv_heads, kv_heads), dim=1)
    cos, sin = angles(7, head_dim, device)
    expected = rope_reference(qk.contiguous(), cos, sin)
    torch.testing.assert_close(rope(qk, cos, sin), expected)
    assert torch.equal(qkv, before)
    rope_(qk, cos, sin)
    torch.testing.assert_close(merged[:, : heads + kv_heads], expected)
    assert torch.equal(v, before.unflatten(-1, (-1, head_dim))[:, heads + kv_heads :])


@pytest.mark.parametrize("layout", ["heads first", "every other column", "one token for all"])
def test_strides(layout, device):
    """Inputs, angles and incoming gradients of any strides."""
    x, d_out = {
        "heads first": lambda: torch.randn(2, 3, 5, 8, device=device).transpose(1, 2),
        "every other column": lambda: torch.randn(2, 5, 3, 16, device=device)[..., ::2],
        "one token for all": lambda: torch.randn(2, 1, 3, 8, device=device).expand(2, 5, 3, 8),
    }[layout]()
    cos, sin = (t.t().contiguous().t() for t in angles(5, 8, device))
    torch.testing.assert_close(rope(x, cos, sin), rope_reference(x.contiguous(), cos, sin))
    mine = gradient(rope, x, cos, sin, d_out)
    torch.testing.assert_close(mine, gradient(rope_reference, x.contiguous(), cos, sin, d_out.contiguous()))
    if layout != "one token for all":
        expected = rope_reference(x.contiguous(), cos, sin)
        torch.testing.assert_close(rope_(x, cos, sin), expected)


@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0, 8)])
def test_empty(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    cos = torch.zeros(shape[0], 4, device=device)
    rope(x, cos, cos).sum().backward()
    assert x.grad.shape == rope_(x.detach(), cos, cos).shape == shape


def test_keeps_the_angles_alone_for_the_backward_pass(device):
    kept = []
    x, (cos, sin) = torch.randn(4, 2, 8, device=device, requires_grad=True), angles(4, 8, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rope(x, cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]


def test_gradient_by_finite_differences(device):
    """And the gradient's own gradient: the backward pass is the op itself, turned back."""
    x, (cos, sin) = torch.randn(2, 1, 4, device=device, requires_grad=True), angles(2, 4, device)
    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,), eps=1e-2, atol=2e-3, rtol=2e-3)
        assert torch.autograd.gradgradcheck(lambda x: rope(x, cos, sin), (x,), eps=1e-2, atol=2e-3, rtol=2e-3)


def test_in_place_is_refused_where_a_gradient_is_wanted(device):
    x, (cos, sin) = torch.randn(4, 2, 8, device=device, requires_grad=True), angles(4, 8, device)
    with pytest.raises(ValueError, match="use rope"):
        rope_(x, cos, sin)


@pytest.mark.parametrize("op", [rope, rope_])
def test_wrong_shapes_are_refused(op, device):
    x, cos = torch.zeros(4, 2, 8, device=device), torch.zeros(4, 4, device=device)
    for broken in ((x, cos[:3], cos[:3]), (x, cos, cos[:, :3]), (x[..., :7], cos, cos), (x, cos[:1], cos[:1])):
        with pytest.raises(ValueError, match="expected"):
            op(*broken)


def test_opcheck(device):
    x, (cos, sin) = torch.randn(4, 2, 8, device=device), angles(4, 8, device)
    ops = torch.ops.llava_kernels
    for inverse in (False, True):
        torch.library.opcheck(ops.rope, (x.clone().requires_grad_(), cos, sin, inverse))
    torch.library.opcheck(ops.rope_, (x, cos, sin))


def test_compiled(device):
    x, d_out = torch.randn(2, 4, 2, 8, device=device)
    cos, sin = angles(4, 8, device)
    compiled = torch.compile(lambda x, cos, sin: rope(x, cos, sin) + 1, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cos, sin), rope_reference(x, cos, sin) + 1)
    mine, expected = (gradient(f, x, cos, sin, d_out) for f in (compiled, rope_reference))
    torch.testing.assert_close(mine, expected)


def test_compiled_in_place(device):
    """On a slice: what is mutated is a view of the compiled function's own tensor."""

    def step(x, cos, sin):
        merged = x * 2
        rope_(merged[:, :2], cos, sin)
        return merged

    x, (cos, sin) = torch.randn(4, 3, 8, device=device), angles(4, 8, device)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(x, cos, sin), step(x, cos, sin))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(device):
    x, (cos, sin) = torch.randn(6, 4, 128, device=device), angles(6, 128, device)
    rope_(x.clone(), cos, sin)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_(x, cos, sin)
    expected = rope_reference(x.normal_().clone(), cos, sin)
    graph.replay()
    torch.testing.assert_close(x, expected)
