"""The ops on CPU tensors through the C library, against float64; and when they do not go there."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import llava_kernels as lk
from llava_kernels import library, native

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])


@pytest.fixture
def calls(monkeypatch):
    """Names of the library's functions that were called."""
    seen = []

    class Spy:
        def __init__(self, of):
            self.of = of

        def __getattr__(self, name):
            if name.startswith("lk_"):
                seen.append(name)
            return getattr(self.of, name)

    made = native.handle()
    monkeypatch.setattr(made, "library", Spy(made.library))
    with lk.implementation("native"):
        yield seen


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, exact, dtype, size=1.0):
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)


@dtypes
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_linear(kind, dtype, calls):
    size = {torch.float32: 1000, torch.bfloat16: 10}[dtype]  # the library rounds activations to 16 bits
    quantize, dequantize, linear = (getattr(lk, f"{name}_{kind}") for name in ("quantize", "dequantize", "linear"))
    weight, bias = quantize(noise(37, 300, seed=1)), noise(37, dtype=dtype, seed=2)
    for shape in ((300,), (2, 3, 300), (64, 300)):
        x = noise(*shape, dtype=dtype)
        exact = x.double() @ dequantize(weight).double().T + bias.double()
        close(linear(x, weight, bias), exact, dtype, size)
    assert calls == ["lk_linear"] * 3
    strided = noise(4, 600, dtype=dtype)[:, ::2]
    close(linear(strided, weight), strided.double() @ dequantize(weight).double().T, dtype, size)
    linear(noise(65, 300, dtype=dtype), weight)  # many rows: one dequantisation and torch's product
    with lk.implementation("reference"):
        linear(x, weight)
    assert len(calls) == 4


@dtypes
def test_linear_gelu(dtype, calls):
    weight, bias = noise(70, 300, dtype=dtype, seed=1) / 300**0.5, noise(70, dtype=dtype, seed=2)
    tower = noise(3, 100, 300, dtype=dtype)  # a class token before the patches
    for x in (tower[:, 1:], noise(300, dtype=dtype), noise(2, 2, 5, 300, dtype=dtype), tower[:0], tower[..., :150]):
        columns = weight[:, : x.shape[-1]]
        for added in (bias, None):
            y = x.double() @ columns.double().T + (0 if added is None else added.double())
            exact = y * torch.special.erfc(-y / 2**0.5) / 2
            with torch.no_grad():
                close(lk.linear_gelu(x, columns, added), exact, dtype, 3)
    assert calls == ["lk_linear"] * 8  # not for nothing
    with lk.implementation("auto"):  # by itself, too; not where gradients are wanted
        lk.linear_gelu(x, columns, bias)
        assert len(calls) == 9
        one = noise(150, dtype=dtype)
        alike = lk.linear_gelu(one.expand(5, 150), columns, bias)  # rows that lie in one place
        torch.testing.assert_close(alike, lk.linear_gelu(one, columns, bias).expand(5, 70))
        thin = noise(1, 70, dtype=dtype).t()  # (70, 1), whose columns may lie anywhere
        close(
            lk.linear_gelu(one[:1], thin, None), torch.nn.functional.gelu(one[0].double() * thin[:, 0].double()), dtype
        )
        assert len(calls) == 12
        lk.linear_gelu(x, columns.clone().requires_grad_(), bias).sum().backward()
    assert len(calls) == 12


@dtypes
def test_project_splice(dtype, calls):
    tower = noise(2, 7, 20, dtype=dtype)  # a class token before six patches
    weight, bias, table = noise(9, 20, dtype=dtype, seed=1), noise(9, dtype=dtype, seed=2), noise(11, 9, dtype=dtype)
    places = torch.randperm(17, generator=torch.Generator().manual_seed(3)).int()
    image, text = places[:12], places[12:]
    ids = torch.arange(17) % 11
    ids[image.long()] = -200
    twice = tower[:1, 1:].expand(2, 6, 20)  # both images lie in one place
    for features in (tower[:, 1:], tower[:, 1:].flatten(0, 1), twice):
        for added in (bias, None):
            exact = torch.empty(17, 9, dtype=torch.double)
            exact[image.long()] = features.reshape(12, 20).double() @ weight.double().T + (
                0 if added is None else added.double()
            )
            exact[text.long()] = table[ids[text.long()]].double()
            close(lk.project_splice(features, weight, added, table, ids, image, text), exact, dtype, size=10)
    assert calls == ["lk_project_splice"] * 6
    with pytest.raises(library.LibraryError, match="stands twice"):
        lk.project_splice(tower[:, 1:], weight, bias, table, ids, image.clamp(max=3), text)


@dtypes
def test_paged_attention(dtype, calls):
    memory = noise(6, 4, 2, 2, 10, dtype=dtype)  # the engine's: blocks, tokens of one, k and v, heads, head_dim
    k, v = memory[:, :, 0], memory[:, :, 1]
    table = torch.tensor([[5, 0, 3], [2, 1, -1]], dtype=torch.int32)
    lengths, starts = torch.tensor([11, 6], dtype=torch.int32), torch.tensor([0, 1, 4], dtype=torch.int32)
    q = noise(4, 6, 10, dtype=dtype)
    found = lk.paged_attention(q, k, v, table, lengths, starts, max_query=3, max_context=11)
    assert calls == ["lk_paged_attention"]
    for s, (length, first, last) in enumerate(((11, 0, 1), (6, 1, 4))):
        keys, values = (c[table[s].clamp(min=0).long()].flatten(0, 1)[:length].double() for c in (k, v))
        seen = torch.ones(last - first, length, dtype=torch.bool).tril(length - (last - first))
        exact = scaled_dot_product_attention(
            q[first:last].double().transpose(0, 1), *(t.transpose(0, 1) for t in (keys, values)), seen, enable_gqa=True
        ).transpose(0, 1)
        close(found[first:last], exact, dtype)
    # The padding of a recorded step has queries and no keys: torch gives zeros.
    nothing = lk.paged_attention(q, k, v, table, lengths * 0, starts, max_query=3, max_context=11)
    assert not nothing.any() and len(calls) == 1


def test_gradients_are_torchs(calls):
    features, weight = noise(4, 8), noise(6, 8, seed=1).requires_grad_()
    places, table = torch.arange(4).int(), noise(3, 6)
    out = lk.project_splice(features, weight, None, table, torch.zeros(4).long(), places, places[:0])
    out.sum().backward()
    torch.testing.assert_close(weight.grad, features.sum(0).expand(6, 8))
    assert calls == []
    with torch.no_grad():
        for choice in ("native", "auto", "reference"):
            with lk.implementation(choice):
                lk.project_splice(features, weight, None, table, torch.zeros(4).long(), places, places[:0])
    assert calls == ["lk_project_splice"] * 2


def test_registration():
    """torch.ops finds it, fake tensors and torch.export go through it, threads have handles of their own."""
    weight, x = lk.quantize_int8(noise(5, 40)), noise(3, 40)
    torch.library.opcheck(torch.ops.llava_kernels.linear_int8.default, (x, weight.words, weight.scale, None))

    class Net(torch.nn.Module):
        def forward(self, x):
            return lk.linear_int8(x, weight) + 1

    with lk.implementation("native"):
        exported = torch.export.export(Net(), (x,))
        assert any("linear_int8" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(x), lk.linear_int8(x, weight) + 1)
    seen = [native.handle()]
    from threading import Thread

    thread = Thread(target=lambda: seen.append(native.handle()))
    thread.start()
    thread.join()
    assert seen[0] is native.handle() and seen[0] is not seen[1]
