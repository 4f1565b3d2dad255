"""project_splice by its kernels, against float64 arithmetic on the same inputs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava_kernels import project_splice
from llava_kernels.project_splice import project_splice_reference

pytestmark = pytest.mark.usefixtures("triton_path")
MODULE = importlib.import_module("llava_kernels.project_splice")  # the package's attribute of this name is the op
# Blocks so small that a few rows make many tiles, in groups of which the last is not full.
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 2, "num_stages": 2}
SMALL_COPY = {"COPY_ROWS": 4, "COPY_COLUMNS": 32}
SMALL_ROWS = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 32, "num_warps": 1}
NAMES = ("features", "weight", "bias", "embedding")


@dataclass
class Case:
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    embedding: Tensor
    input_ids: Tensor
    image_rows: Tensor
    text_rows: Tensor

    def arguments(self) -> tuple[Tensor | None, ...]:
        return tuple(vars(self).values())

    def trained(self, *names: str) -> Case:
        """Leaves of their own; those in ``names`` want gradients. Layouts stay."""
        leaves = {n: getattr(self, n) for n in NAMES if getattr(self, n) is not None}
        return replace(self, **{n: t.detach().requires_grad_(n in names) for n, t in leaves.items()})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["table", "small"])
def blocks(request, monkeypatch):
    """The launchers' own block sizes, and small ones."""
    if request.param == "small":
        sizes = {"project_splice": SMALL | SMALL_COPY, "project_splice_embedding_grad": SMALL_ROWS}
        monkeypatch.setattr(
            MODULE, "blocks_for", lambda op, device, size: dict(sizes.get(op.removesuffix("_fp32"), SMALL))
        )


def spread(layout: str, images: int, patches: int, c: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Features of one shape that lie in memory in different ways."""
    match layout:
        case "one run":
            return torch.randn(images, patches, c, dtype=dtype, device=device)
        case "class token":
            whole = torch.randn(images, 1 + patches, c, dtype=dtype, device=device)
            whole[:, 0] = float("nan")  # whoever reads it shows it
            return whole[:, 1:]
        case "patches first":
            return torch.randn(patches, images, c, dtype=dtype, device=device).transpose(0, 1)
        case "columns apart":
            return torch.randn(images, patches, 2 * c, dtype=dtype, device=device)[..., ::2]
        case "matrix":
            return torch.randn(images * patches, c + 3, dtype=dtype, device=device)[:, :c]
        case "four dimensions":
            return torch.randn(1, images, patches + 1, c, dtype=dtype, device=device)[:, :, 1:]
    raise AssertionError(layout)


def make(
    size: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    layout: str = "class token",
    bias: bool = True,
    shuffled: bool = True,
    vocabulary: int = 9,
) -> Case:
    """size: (images, patches, C, D, text rows)."""
    images, patches, c, d, text = size
    p = images * patches
    at = (
        torch.randperm(p + text, device=device)
        if shuffled
        else (torch.arange(p + text, device=device) + 2) % (p + text)
    )
    image_rows, text_rows = at[:p].int(), at[p:].int()
    ids = torch.full((p + text,), -200, device=device)  # as in the authors' code: outside the table
    ids[text_rows.long()] = torch.randint(0, vocabulary, (text,), device=device)
    return Case(
        spread(layout, images, patches, c, dtype, device),
        torch.randn(d, c, dtype=dtype, device=device) / c**0.5,
        torch.randn(d, dtype=dtype, device=device) if bias else None,
        torch.randn(vocabulary, d, dtype=dtype, device=device),
        ids,
        image_rows,
        text_rows,
    )


def exact(case: Case) -> Tensor:
    features, weight = case.features.double().reshape(-1, case.weight.shape[1]), case.weight.double()
    out = torch.full((len(case.input_ids), len(weight)), float("nan"), dtype=torch.float64, device=weight.device)
    out[case.image_rows.long()] = features @ weight.T + (0 if case.bias is None else case.bias.double())
    out[case.text_rows.long()] = case.embedding.double()[case.input_ids[case.text_rows.long()]]
    return out


def exact_gradients(case: Case, grad: Tensor) -> dict[str, Tensor]:
    features, grad = case.features.double(), grad.double()
    image = grad[case.image_rows.long()]
    embedding = torch.zeros_like(case.embedding, dtype=torch.float64)
    for row in case.text_rows.tolist():
        embedding[case.input_ids[row]] += grad[row]
    return {
        "features": (image @ case.weight.double()).reshape(features.shape),
        "weight": image.T @ features.reshape(-1, features.shape[-1]),
        "bias": image.sum(0),
        "embedding": embedding,
    }


def gradients(function, case: Case, grad: Tensor, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    case = case.trained(*names)
    out = function(*case.arguments())
    found = torch.autograd.grad(out, [getattr(case, n) for n in names], grad.to(out.dtype))
    return dict(zip(names, found, strict=True))


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor, times: int) -> None:
    """At most ``times`` torch's own error, plus one rounding of 1 or of the largest value, where torch is exact."""
    assert mine.dtype == torchs.dtype
    assert mine.shape == torchs.shape == exact.shape
    if mine.numel() == 0:
        return
    error, torch_error = ((a.double() - exact).abs().max().item() for a in (mine, torchs))
    assert error <= times * torch_error + torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


# (images, patches, C, D, text rows)
SIZES = [
    pytest.param((1, 1, 1, 1, 1), id="one of each"),
    pytest.param((3, 7, 33, 50, 11), id="odd"),
    pytest.param((2, 36, 40, 72, 37), id="even, several tiles"),
    pytest.param((5, 13, 64, 48, 1), id="one text row"),
    pytest.param((0, 4, 24, 40, 5), id="no image"),
    pytest.param((2, 3, 24, 40, 0), id="no text"),
    pytest.param((0, 4, 24, 40, 0), id="nothing"),
]


@pytest.mark.parametrize("size", SIZES)
def test_forward(size, dtype, device, blocks):
    """Every row once, in any order: a row that nobody wrote keeps what new_empty found."""
    case = make(size, dtype, device)
    assert_as_good_as_torch(
        project_splice(*case.arguments()), project_splice_reference(*case.arguments()), exact(case), 2
    )


@pytest.mark.parametrize("size", SIZES)
def test_gradients(size, dtype, device, blocks):
    case = make(size, dtype, device)
    grad = torch.randn(len(case.input_ids), size[3], dtype=dtype, device=device)
    mine, torchs = (gradients(f, case, grad) for f in (project_splice, project_splice_reference))
    for name, expected in exact_gradients(case, grad).items():
        assert_as_good_as_torch(mine[name], torchs[name], expected, 3)


@pytest.mark.parametrize(
    "layout", ["one run", "class token", "patches first", "columns apart", "matrix", "four dimensions"]
)
def test_layouts_of_features(layout, device):
    case = make((3, 5, 20, 18, 4), torch.float32, device, layout=layout, shuffled=False)
    grad = torch.randn(19, 18, device=device)
    torch.testing.assert_close(project_splice(*case.arguments()).double(), exact(case), atol=1e-5, rtol=1e-5)
    for name, found in gradients(project_splice, case, grad).items():
        torch.testing.assert_close(found.double(), exact_gradients(case, grad)[name], atol=1e-5, rtol=1e-5)


def test_features_without_class_token_are_not_copied(device):
    hidden = torch.randn(3, 6, 8, device=device)[:, 1:]
    rows, patches, image_stride, patch_stride = MODULE._rows_of(hidden)
    assert rows.data_ptr() == hidden.data_ptr()
    assert (patches, image_stride, patch_stride) == (5, 48, 8)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "column slice"])
def test_strides_of_the_other_operands(layout, device):
    case = make((2, 5, 20, 18, 4), torch.float32, device)

    def lie(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.t().contiguous().t()
        return torch.cat((t, t), -1)[..., : t.shape[-1]]

    grad = torch.randn(1, 1, device=device).expand(14, 18) if layout == "expanded" else lie(torch.randn(14, 18))
    grad = grad.to(device)
    expected = gradients(project_splice_reference, case, grad)
    case = replace(case, weight=lie(case.weight), embedding=lie(case.embedding))
    case = replace(
        case, image_rows=torch.stack((case.image_rows,) * 2, 1)[:, 0], input_ids=lie(case.input_ids[None])[0]
    )
    torch.testing.assert_close(project_splice(*case.arguments()).double(), exact(case), atol=1e-5, rtol=1e-5)
    for name, found in gradients(project_splice, case, grad).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-5)


def test_int64_rows_and_no_bias(device):
    case = make((2, 5, 20, 18, 4), torch.float32, device, bias=False)
    case = replace(case, image_rows=case.image_rows.long(), text_rows=case.text_rows.long())
    names = ("features", "weight", "embedding")
    grad = torch.randn(14, 18, device=device)
    torch.testing.assert_close(project_splice(*case.arguments()).double(), exact(case), atol=1e-5, rtol=1e-5)
    for name, found in gradients(project_splice, case, grad, names).items():
        torch.testing.assert_close(found.double(), exact_gradients(case, grad)[name], atol=1e-5, rtol=1e-5)


def test_output_takes_the_embeddings_dtype(device):
    case = make((2, 5, 20, 18, 4), torch.float16, device)
    case = replace(case, embedding=case.embedding.float())
    grad = torch.randn(14, 18, device=device)
    out = project_splice(*case.arguments())
    assert out.dtype == torch.float32
    assert_as_good_as_torch(out, project_splice_reference(*case.arguments()), exact(case), 2)
    torchs = gradients(project_splice_reference, case, grad)
    for name, found in gradients(project_splice, case, grad).items():
        assert_as_good_as_torch(found, torchs[name], exact_gradients(case, grad)[name], 3)


@pytest.mark.parametrize("vocabulary", [1, 3])
def test_embedding_gradient_of_repeated_tokens_is_the_same_every_time(vocabulary, device, blocks):
    """A token on more rows than a program takes at once, and rows that no text points at."""
    case = make((1, 2, 4, 20, 40), torch.float32, device, vocabulary=vocabulary)
    case = replace(case, embedding=torch.randn(vocabulary + 2, 20, device=device))
    grad = torch.randn(42, 20, device=device)
    first, second = (gradients(project_splice, case, grad, ("embedding",))["embedding"] for _ in range(2))
    assert torch.equal(first, second)
    assert not first[vocabulary:].any()
    torch.testing.assert_close(first.double(), exact_gradients(case, grad)["embedding"], atol=1e-5, rtol=1e-5)


class Launched(TorchDispatchMode):
    """Which ops of the package ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace == "llava_kernels":
            self.names.append(function.__name__.removesuffix(".default").removeprefix("project_splice"))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    ("names", "expected", "saved"),
    [
        (("weight", "bias"), ["_weight_grad"], {"features", "image_rows"}),
        (("bias",), ["_weight_grad"], {"features", "image_rows"}),
        (("features",), ["_feature_grad"], {"weight", "image_rows"}),
        (("embedding",), ["_embedding_grad"], {"input_ids", "text_rows"}),
    ],
)
def test_nothing_is_computed_or_kept_for_what_is_frozen(names, expected, saved, device):
    case = make((2, 3, 8, 8, 4), torch.float32, device).trained(*names)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = project_splice(*case.arguments())
    assert {n for n, t in vars(case).items() if t.data_ptr() in kept} == saved
    assert len(kept) == len(saved)
    with Launched() as launched:
        out.sum().backward()
    assert launched.names == expected
    assert {n for n in NAMES if getattr(case, n).grad is not None} == set(names)


def test_forward_of_frozen_parts_has_no_graph(device):
    assert project_splice(*make((1, 3, 8, 8, 4), torch.float32, device).arguments()).grad_fn is None


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
def test_gradients_are_the_slopes(device):
    """Finite differences. The op is linear in each input, so that wide steps are exact but for rounding."""
    case = make((2, 1, 2, 3, 2), torch.float32, device, vocabulary=2).trained(*NAMES)
    assert torch.autograd.gradcheck(project_splice, case.arguments(), eps=0.5, atol=1e-4, rtol=1e-4)


def test_opcheck(device):
    case = make((2, 3, 8, 6, 4), torch.float32, device).trained(*NAMES)
    grad, ops = torch.randn(10, 6, device=device), torch.ops.llava_kernels
    torch.library.opcheck(ops.project_splice, case.arguments())
    frozen = case.trained()
    for with_bias in (False, True):
        torch.library.opcheck(ops.project_splice_weight_grad, (grad, frozen.features, frozen.image_rows, with_bias))
    torch.library.opcheck(ops.project_splice_feature_grad, (grad, frozen.weight, frozen.image_rows))
    torch.library.opcheck(ops.project_splice_embedding_grad, (grad, frozen.input_ids, frozen.text_rows, 9))


def test_compiles(device):
    case = make((2, 3, 8, 6, 4), torch.float32, device)
    grad = torch.randn(10, 6, device=device)
    mine = gradients(torch.compile(project_splice, backend="aot_eager"), case, grad)
    for name, expected in gradients(project_splice, case, grad).items():
        assert torch.equal(mine[name], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_cuda_graphs(device):
    case = make((2, 36, 64, 64, 20), torch.float16, device).trained(*NAMES)
    grad = torch.randn(92, 64, dtype=torch.float16, device=device)

    def work() -> list[Tensor]:
        out = project_splice(*case.arguments())
        return [out, *torch.autograd.grad(out, [getattr(case, n) for n in NAMES], grad)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = work()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, weight=c.weight[:, 1:]), "columns"),
        (lambda c: replace(c, bias=c.bias[1:]), "width"),
        (lambda c: replace(c, embedding=c.embedding[:, 1:]), "width"),
        (lambda c: replace(c, image_rows=c.image_rows[1:]), "image_rows"),
        (lambda c: replace(c, text_rows=c.text_rows[1:]), "text_rows"),
        (lambda c: replace(c, weight=c.weight.half()), "must be so too"),
        (lambda c: replace(c, features=c.features.double()), "float64"),
    ],
)
def test_errors(change, message, device):
    with pytest.raises(ValueError, match=message):
        project_splice(*change(make((2, 3, 8, 6, 4), torch.float32, device)).arguments())
