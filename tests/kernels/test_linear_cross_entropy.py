"""linear_cross_entropy's Triton path against float64 arithmetic."""

from __future__ import annotations

import importlib

import pytest
import torch

from llava_kernels import linear_cross_entropy
from llava_kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy_reference

module = importlib.import_module("llava_kernels.linear_cross_entropy")  # the package's attribute is the function
FLOOR = 1e-6  # of the largest value: where torch happens to be exact, rounding to float32 must still be allowed


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(rows, dim, vocab, device, dtype, spread=2.0):
    hidden = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, dim, device=device) * spread / dim**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), device=device)


def exact(hidden, weight, labels):
    """Loss and gradients in float64, written out: no softmax or cross entropy of torch's."""
    h, w = hidden.detach().double(), weight.detach().double()
    z = h @ w.T
    p = torch.exp(z - z.amax(1, keepdim=True))
    p = p / p.sum(1, keepdim=True)
    rows = torch.arange(len(h), device=h.device)
    loss = -torch.log(p[rows, labels]).sum()
    p[rows, labels] -= 1
    return loss, p @ w, p.T @ h


def evaluate(op, hidden, weight, labels, scale=1.0):
    loss = op(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


def assert_as_close_as_torch(mine, torchs, truth):
    """The loss within twice, gradients within three times the error of plain torch in the same dtype."""
    for ours, theirs, true, factor in zip(mine, torchs, truth, (2, 3, 3), strict=True):
        error, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
        assert error <= factor * allowed + FLOOR * true.abs().max().item()


@pytest.mark.parametrize(
    ("rows", "dim", "vocab"), [(1, 8, 5), (7, 16, 640), (33, 24, 1000), (5, 32, 2048), (3, 8, 9001)]
)
def test_loss_and_gradients(triton_path, device, dtype, rows, dim, vocab):
    inputs = make(rows, dim, vocab, device, dtype)
    torchs = evaluate(linear_cross_entropy_reference, *inputs)
    assert_as_close_as_torch(evaluate(linear_cross_entropy, *inputs), torchs, exact(*inputs))


@pytest.mark.parametrize("step", [1, 4, 6, 16])
def test_chunks_add_up(triton_path, device, dtype, monkeypatch, step):
    """Several chunks, the last one short, give what one chunk gives; the weight gradient is summed in float32."""
    inputs = make(16, 12, 80, device, dtype)
    torchs = evaluate(linear_cross_entropy_reference, *inputs)
    monkeypatch.setattr(module, "chunk_rows", lambda *_: step)
    assert_as_close_as_torch(evaluate(linear_cross_entropy, *inputs), torchs, exact(*inputs))


def test_weight_gradient_over_many_chunks_keeps_small_parts(triton_path, device, monkeypatch):
    """Added up in float16, 1 + 40 / 4096 would stay 1: each part is a quarter of the spacing of the numbers."""
    hidden = torch.full((41, 1), 2**-12, device=device, dtype=torch.float16)
    hidden[0] = 1
    weight = torch.zeros(2, 1, device=device, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(41, device=device, dtype=torch.long)
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 1)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad[1].item() == pytest.approx((1 + 40 * 2**-12) / 2, rel=1e-3)


def test_scale_from_above_and_two_backwards(triton_path, device):
    hidden, weight, labels = make(5, 8, 40, device, torch.float32)
    _, by_hidden, by_weight = exact(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels) / 5
    for scale in (1.0, 3.0, 1.0):  # the first backward must leave what the second needs
        mine = torch.autograd.grad(loss * scale, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(mine[0].double(), by_hidden * scale / 5, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine[1].double(), by_weight * scale / 5, rtol=1e-5, atol=1e-6)


def test_gradients_by_finite_differences(triton_path, device):
    hidden, weight, labels = make(3, 4, 6, device, torch.float32)
    _, by_hidden, by_weight = evaluate(linear_cross_entropy, hidden, weight, labels)
    for tensor, gradient in ((hidden, by_hidden), (weight, by_weight)):
        along = torch.randn_like(tensor)
        with torch.no_grad():
            ends = []
            for step in (1e-2, -1e-2):
                tensor += step * along
                ends.append(linear_cross_entropy(hidden, weight, labels).double())
                tensor -= step * along
        assert ((ends[0] - ends[1]) / 2e-2).item() == pytest.approx((gradient * along).sum().item(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_no_gradient_of_what_is_frozen(triton_path, device, monkeypatch, frozen):
    hidden, weight, labels = make(6, 8, 30, device, torch.float32)
    truth = exact(hidden, weight, labels)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    made = []
    real = module._forward
    monkeypatch.setattr(module, "_forward", lambda *a: made.append(real(*a)) or made[-1])
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-6, atol=0)
    assert [x.numel() for x in made[0][1:]] == [48 * (frozen == "weight"), 240 * (frozen == "hidden")]
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        trained, true = (hidden, truth[1]) if frozen == "weight" else (weight, truth[2])
        torch.testing.assert_close(trained.grad.double(), true, rtol=1e-5, atol=1e-6)


def test_no_gradient_under_no_grad(triton_path, device, monkeypatch):
    inputs = make(4, 8, 30, device, torch.float32)
    asked = []
    real = module._cross_entropy
    monkeypatch.setattr(module, "_cross_entropy", lambda *a, gradient: asked.append(gradient) or real(*a, gradient))
    with torch.no_grad():
        loss = linear_cross_entropy(*inputs)
    assert asked == [False]
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), exact(*inputs)[0], rtol=1e-6, atol=0)


def test_the_loss_alone_leaves_the_logits_as_they_are(device):
    logits = torch.randn(3, 700, device=device)
    before, losses = logits.clone(), torch.empty(3, device=device)
    module._cross_entropy(logits, torch.tensor([0, 5, 699], device=device), losses, gradient=False)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("gap", [4.0, 8.0, 12.0, 15.0])
def test_gradient_of_a_label_that_is_nearly_certain(device, dtype, gap):
    """softmax - 1 keeps sign and size where softmax, rounded to half precision first, would be 1."""
    logits = torch.zeros(2, 600, device=device, dtype=dtype)
    labels = torch.tensor([3, 577], device=device)
    logits[[0, 1], labels] = gap
    z = logits.double()
    true = -(z.exp().sum(1) - z.exp()[[0, 1], labels]) / z.exp().sum(1)
    torchs = (torch.softmax(logits.float(), 1)[[0, 1], labels] - 1).to(dtype)
    module._cross_entropy(logits, labels, torch.empty(2, device=device), gradient=True)
    mine = logits[[0, 1], labels]
    assert (mine < 0).all()
    ulp = torch.finfo(dtype).eps * true.abs().max().item()
    assert (mine.double() - true).abs().max().item() <= max((torchs.double() - true).abs().max().item(), ulp)


def test_large_logits_and_a_row_of_equal_ones(device):
    logits = torch.zeros(3, 1500, device=device)
    logits[0] = 3e4
    logits[1] = torch.linspace(-3e4, 3e4, 1500)
    labels, losses = torch.tensor([7, 1499, 0], device=device), torch.empty(3, device=device)
    truth = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    module._cross_entropy(logits, labels, losses, gradient=True)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-6, atol=1e-6)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.sum(1), torch.zeros(3, device=device), rtol=0, atol=1e-5)


def test_logits_of_minus_infinity(device):
    """A whole first block of them, and in the second row the label's own: that loss is infinite."""
    logits = torch.randn(2, 9000, device=device)
    logits[:, :8400] = -float("inf")
    labels, losses = torch.tensor([8500, 5], device=device), torch.empty(2, device=device)
    kept = logits[0, 8400:].double()
    truth = torch.zeros(9000, dtype=torch.float64, device=device)
    truth[8400:] = kept.exp() / kept.exp().sum()
    truth[8500] -= 1
    loss = kept.exp().sum().log() - kept[100]
    module._cross_entropy(logits, labels, losses, gradient=True)
    torch.testing.assert_close(losses.double(), torch.stack([loss, loss + float("inf")]), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits[0].double(), truth, rtol=1e-5, atol=1e-7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("label", [-100, -1, 20, 10**12])
def test_label_outside_the_vocabulary_poisons_its_row_alone(device, label):
    """Rows lie in the middle of a larger buffer, whose other values are watched."""
    around = torch.randn(5, 32, device=device)
    before, logits, losses = around.clone(), around[1:4, :20], torch.zeros(3, device=device)
    module._cross_entropy(logits, torch.tensor([4, label, 19], device=device), losses, gradient=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, False]
    assert torch.equal(around[:, 20:], before[:, 20:])
    assert torch.equal(around[[0, 4]], before[[0, 4]])


def test_strides(triton_path, device):
    hidden = torch.randn(8, 14, device=device).t()[::2].requires_grad_()  # (7, 8)
    weight = torch.randn(8, 50, device=device).t().requires_grad_()  # (50, 8)
    labels = torch.randint(0, 50, (14,), device=device)[::2]
    for a, b in zip(evaluate(linear_cross_entropy, hidden, weight, labels), exact(hidden, weight, labels), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_no_rows(triton_path, device):
    hidden, weight, labels = make(0, 8, 30, device, torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.shape == weight.shape and not weight.grad.any()
    assert hidden.grad.shape == (0, 8)


def test_same_results_in_every_run(triton_path, device, dtype):
    inputs = make(9, 16, 300, device, dtype)
    first, second = evaluate(linear_cross_entropy, *inputs), evaluate(linear_cross_entropy, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("trains_weight", [True, False])
@pytest.mark.parametrize("rows", [1, 127, 500, 1024, 4096, 8192, 8193, 16384, 100_000])
def test_chunk_rows(rows, trains_weight):
    step = chunk_rows(rows, 4096, trains_weight)
    assert 1 <= step <= rows
    assert step == rows or step % 128 == 0
    chunks = -(-rows // step)
    if trains_weight:
        assert chunks == 1 if rows <= 8192 else 2048 <= step <= 4096
    else:
        assert chunks <= 8 and (chunks == 1 or step >= 1024)


def test_wrong_shapes_are_refused(device):
    hidden, weight, labels = make(4, 8, 30, device, torch.float32)
    with pytest.raises(ValueError, match=r"\(4, 8\) and weight \(30, 7\)"):
        linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match=r"4 rows need \(4,\)"):
        linear_cross_entropy(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match="must agree"):
        linear_cross_entropy(hidden, weight.half(), labels)


@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_opcheck(device, flags):
    hidden, weight, labels = make(5, 8, 30, device, torch.float32)
    hidden.requires_grad_(flags[0])
    weight.requires_grad_(flags[1])
    torch.library.opcheck(torch.ops.llava_kernels.linear_cross_entropy, (hidden, weight, labels, *flags))
    backward = torch.ops.llava_kernels.linear_cross_entropy_backward
    torch.library.opcheck(backward, (torch.tensor(0.5, device=device), hidden.detach(), weight.detach()))


def test_compiled(triton_path, device):
    inputs = make(6, 8, 30, device, torch.float32)

    def mean(hidden, weight, labels):
        return linear_cross_entropy(hidden * 2, weight, labels) / 6

    eager = evaluate(mean, *inputs)
    for a, b in zip(evaluate(torch.compile(mean, backend="aot_eager"), *inputs), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(device, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 4)
    inputs = make(9, 16, 64, device, torch.bfloat16)
    eager = evaluate(linear_cross_entropy, *inputs)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(linear_cross_entropy, *inputs)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
