"""The operations' definitions against transformers' modules, or float64 arithmetic written another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from llava_kernels import (
    linear_cross_entropy,
    linear_gelu,
    project_splice,
    rms_norm,
    rope,
    swiglu,
    varlen_attention,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas(dtype):
    x, norm = torch.randn(7, 24, dtype=dtype), LlamaRMSNorm(24, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


def test_rope_is_llamas():
    x, angles = torch.randn(9, 5, 8), torch.randn(9, 4)
    both = torch.cat([angles, angles], -1).unsqueeze(0)
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], both.cos(), both.sin())
    torch.testing.assert_close(rope(x, angles.cos(), angles.sin()), expected[0].transpose(0, 1))


def test_rope_products_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)
    freqs = torch.rand(8, dtype=torch.float64)

    def product(i, j):
        turned = [rope(x, (n * freqs).cos()[None], (n * freqs).sin()[None]) for x, n in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(3, 1), product(103, 101))


def test_swiglu():
    gate, up = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(swiglu(torch.cat([gate, up], -1)), gate / (1 + torch.exp(-gate)) * up)


def test_linear_gelu():
    x, w, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, 6), (7, 6), (7,)))
    y = x @ w.T + b
    torch.testing.assert_close(linear_gelu(x, w, b), 0.5 * y * (1 + torch.erf(y / 2**0.5)))


@pytest.mark.parametrize("images", [0, 1, 3])
def test_project_splice_against_masked_scatter(images):
    """Forward and every gradient against embedding, linear and masked_scatter, as transformers does it."""
    rows, c, d, vocab, mark = 4, 6, 10, 20, 19
    ids = torch.cat([torch.tensor([1, 2, 3])] + [torch.tensor([mark] * rows + [5, 6])] * images)
    features = torch.randn(images, rows, c, dtype=torch.float64, requires_grad=True)
    weight, bias, table = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((d, c), (d,), (vocab, d)))
    at = ids == mark
    out = project_splice(features, weight, bias, table, ids, at.nonzero()[:, 0].int(), (~at).nonzero()[:, 0].int())
    expected = F.embedding(ids, table).masked_scatter(at[:, None], features @ weight.T + bias)
    assert torch.equal(out, expected)
    coefficients = torch.randn_like(out)
    inputs = (features, weight, bias, table)
    mine = torch.autograd.grad((out * coefficients).sum(), inputs)
    theirs = torch.autograd.grad((expected * coefficients).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_project_splice_reads_no_embedding_at_image_rows():
    """Image ids may lie outside the table, as -200 does."""
    ids = torch.tensor([1, -200, 2])
    out = project_splice(
        torch.ones(1, 3), torch.ones(4, 3), None, torch.zeros(5, 4), ids, torch.tensor([1]), torch.tensor([0, 2])
    )
    assert out.tolist() == [[0] * 4, [3] * 4, [0] * 4]


def test_linear_cross_entropy():
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    labels = torch.randint(0, 9, (6,))
    logits = hidden.double() @ weight.double().T
    expected = (logits.logsumexp(-1) - logits[torch.arange(6), labels]).sum()
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss.double(), expected)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_linear_cross_entropy_of_no_rows_is_zero_and_backpropagates():
    weight = torch.randn(9, 5, requires_grad=True)
    loss = linear_cross_entropy(torch.zeros(0, 5), weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention_against_one_masked_matrix(implementation, kv_heads, causal):
    """All sequences at once under a block-diagonal mask, in float64."""
    lengths, heads, dim = (5, 1, 9), 6, 8
    q = torch.randn(15, heads, dim, requires_grad=True)
    k, v = (torch.randn(15, kv_heads, dim, requires_grad=True) for _ in range(2))
    of = torch.repeat_interleave(torch.tensor(lengths))
    mask = of[:, None] == of
    if causal:
        mask &= torch.ones(15, 15).tril().bool()
    wide = [x.double().repeat_interleave(heads // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
    scores = (wide[0] @ wide[1].transpose(1, 2) / dim**0.5).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ wide[2]).transpose(0, 1)
    out = varlen_attention(q, k, v, lengths, causal=causal, implementation=implementation)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    coefficients = torch.randn_like(out)
    mine = torch.autograd.grad((out * coefficients).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * coefficients).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
