"""Quantised products by their kernels, against float64 products of the dequantised weight; rounding and its bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_kernels import quantized_linear as q
from llava_kernels import tiles

pytestmark = pytest.mark.usefixtures("triton_path")
LINEAR = {"int8": q.linear_int8, "int4": q.linear_int4, "fp8": q.linear_fp8}
REFERENCE = {"int8": q.linear_int8_reference, "int4": q.linear_int4_reference, "fp8": q.linear_fp8_reference}
QUANTIZE = {"int8": q.quantize_int8, "int4": q.quantize_int4, "fp8": q.quantize_fp8}
DEQUANTIZE = {"int8": q.dequantize_int8, "int4": q.dequantize_int4, "fp8": q.dequantize_fp8}
BLOCKS = {  # tiles small enough for several on every axis of small shapes
    "quantized_row": {"BLOCK_N": 4, "BLOCK_WORDS": 64, "MIN_STEPS": 1},
    "quantized_rows": {"BLOCK_N": 8, "MIN_STEPS": 1},
    "quantized_sum_splits": {"BLOCK_SIZE": 64},
    "quantized_dequantize": {"BLOCK_N": 16},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=list(LINEAR))
def form(request) -> str:
    return request.param


@pytest.fixture(params=[1, 1000], ids=["whole", "split"])
def small_tiles(request, monkeypatch):
    """K read by one program after another step, or split between many."""

    def blocks_for(op: str, device: torch.device, size: int) -> dict[str, int]:
        blocks = tiles.blocks_for(op, device, size) | BLOCKS[op.removesuffix("_fp32")]
        return blocks | {"programs": request.param} if "programs" in blocks else blocks

    monkeypatch.setattr(q, "blocks_for", blocks_for)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """At most twice torch's error, plus 2**-22 of the sum of magnitudes: a few roundings in float32."""
    assert mine.dtype == torchs.dtype
    assert mine.shape == torchs.shape == exact.shape
    error, torch_error = ((y.double() - exact).abs().max().item() for y in (mine, torchs))
    assert error <= 2 * torch_error + 2**-22 * magnitude.max().item()


def check_product(form: str, x: Tensor, weight, bias: Tensor | None = None) -> None:
    values = DEQUANTIZE[form](weight)
    assert_as_good_as_torch(
        LINEAR[form](x, weight, bias),
        REFERENCE[form](x, weight, bias),
        product(x, values, bias),
        product(x.abs(), values.abs()),
    )


@pytest.mark.parametrize(("n", "k"), [(9, 512), (5, 300)])
@pytest.mark.parametrize("rows", [1, 19])
def test_product(form, rows, n, k, dtype, device, small_tiles):
    weight = QUANTIZE[form](torch.randn(n, k, device=device) / 8 + 0.02)
    x = torch.randn(rows, k, device=device).to(dtype) + 0.25
    bias = torch.randn(n, device=device).to(dtype) if n == 9 else None
    check_product(form, x, weight, bias)


@pytest.mark.parametrize("rows", [1, 40])
def test_product_at_the_table_s_tiles(form, rows, device):
    """As it is launched on a card: more than one tile of words, of blocks and of output features."""
    weight = QUANTIZE[form](torch.randn(9 if rows == 1 else 65, 4224 if rows == 1 else 1280, device=device))
    check_product(form, torch.randn(rows, weight.in_features, device=device), weight)


@pytest.mark.parametrize("group_size", q.GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 3])
def test_groups(group_size, rows, dtype, device, small_tiles):
    weight = q.quantize_int4(torch.randn(3, 600, device=device), group_size)
    assert weight.scale.shape == weight.offset.shape == (-(-600 // group_size), 3)
    check_product("int4", torch.randn(rows, 600, device=device).to(dtype), weight)


@pytest.mark.parametrize("rows", [1, 64])
def test_every_code_is_read_exactly(form, rows, dtype, device):
    """Rows of x that are one value 1 and else 0 read the weight's values, one by one."""
    k = torch.arange(256)
    if form == "int8":
        codes = q._interleave((k % 255 + 1).to(torch.uint8)[None], 128, 2)
        weight, values = q.Int8Weight(codes.view(torch.int32), torch.ones(1), 256), k % 255 - 127
    elif form == "int4":
        codes = q._interleave((k % 16).to(torch.uint8)[None], 128, 4)
        words = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int32)
        scale, offset = torch.full((2, 1), 0.125).bfloat16(), torch.tensor([[-1.0], [0.25]]).bfloat16()
        weight = q.Int4Weight(words, scale, offset, torch.full((1,), 4.0), 128, 256)
        values = 4 * (0.125 * (k % 16) + torch.where(k < 128, -1.0, 0.25))
    else:
        finite = torch.where(k % 128 == 127, 0, k).to(torch.uint8)
        weight = q.Fp8Weight(q._interleave(finite[None], 128, 2).view(torch.float8_e4m3fn), torch.ones(1), 256)
        sign, exponent, mantissa = finite.int() >> 7, finite.int() >> 3 & 15, finite.int() & 7
        normal = (8 + mantissa) * 2.0 ** (exponent - 10)
        values = torch.where(exponent == 0, mantissa * 2.0**-9, normal) * (1 - 2 * sign)
    assert torch.equal(DEQUANTIZE[form](weight)[0], values.float())
    weight = type(weight)(*(v.to(device) if isinstance(v, Tensor) else v for v in vars(weight).values()))
    one_hot = torch.eye(256, device=device, dtype=dtype)
    at = range(0, 256, rows) if rows > 1 else (0, 3, 65, 100, 131, 254)
    read = torch.cat([LINEAR[form](one_hot[i : i + rows], weight) for i in at])[:, 0]
    expected = values[torch.cat([torch.arange(i, min(i + rows, 256)) for i in at])]
    assert torch.equal(read.cpu(), expected.to(dtype))


@pytest.mark.parametrize("layout", ["slice", "every other", "one row for all", "3-d", "vector", "other first"])
def test_layouts_of_x(form, layout, device):
    weight = QUANTIZE[form](torch.randn(6, 100, device=device))
    wide = torch.randn(4, 230, device=device)
    x = {
        "slice": wide[:, 7:107],
        "every other": wide[:, ::2][:, :100],
        "one row for all": wide[:1, :100].expand(4, 100),
        "3-d": torch.randn(2, 3, 100, device=device),
        "vector": wide[0, :100],
        "other first": torch.randn(100, 5, device=device).t(),
    }[layout]
    check_product(form, x, weight)


@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100)])
def test_no_rows(form, shape, device):
    weight = QUANTIZE[form](torch.randn(6, 100, device=device))
    assert LINEAR[form](torch.zeros(shape, device=device), weight).shape == (*shape[:-1], 6)


def test_many_rows(form, dtype, device):
    """65 rows: dequantised by a kernel, then torch's product."""
    weight = QUANTIZE[form](torch.randn(21, 300, device=device))
    bias = torch.randn(21, device=device, dtype=dtype)
    check_product(form, torch.randn(65, 300, device=device).to(dtype), weight, bias)


@pytest.mark.parametrize(("n", "k"), [(9, 128), (17, 300), (1, 3)])
def test_dequantising_kernel_equals_the_definition(form, n, k, device):
    """Identity as x, so many rows that the weight is dequantised: each value meets a single 1."""
    weight = QUANTIZE[form](torch.randn(n, k, device=device))
    x = torch.zeros(max(k, 65), k, device=device)
    x[:k] = torch.eye(k, device=device)
    assert torch.equal(LINEAR[form](x, weight)[:k].T, DEQUANTIZE[form](weight))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU programs run one after another")
@pytest.mark.parametrize("rows", [1, 8])
def test_the_same_each_time(form, rows, device):
    weight = QUANTIZE[form](torch.randn(40, 2304, device=device))
    x = torch.randn(rows, 2304, device=device)
    assert torch.equal(LINEAR[form](x, weight), LINEAR[form](x, weight))


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e5])
def test_magnitudes(form, magnitude, device):
    """Scales carry any size of weight; x as large as residual streams become."""
    weight = QUANTIZE[form](torch.randn(6, 256, device=device) * magnitude)
    for rows in (1, 2):
        check_product(form, 1e4 * torch.randn(rows, 256, device=device), weight)


def hard_weight() -> Tensor:
    """(12, 700): usual rows, an empty one, a constant one, an outlier, tiny and huge values, one sign only."""
    weight = torch.randn(12, 700) / 50
    weight[1], weight[2] = 0, 0.3
    weight[3, 5] = 40
    weight[4] *= 1e-8
    weight[5] *= 1e8
    weight[6] = weight[6].abs() + 1
    return weight


def test_int8_is_within_half_a_step():
    weight = hard_weight()
    rounded = q.quantize_int8(weight)
    step = torch.where(weight.any(1), weight.abs().amax(1), 1) / 127
    torch.testing.assert_close(rounded.scale, step)
    off = (q.dequantize_int8(rounded) - weight).abs()
    assert (off <= (0.5 + 1e-4) * step[:, None]).all()
    assert off.max(1).values[0] > 0.4 * step[0]  # and the bound is no looser than the rounding


def test_fp8_is_within_half_a_step():
    """Three bits of mantissa: half a step is 1/16 of a value; below 2**-6 of the scale, 2**-10 of it."""
    weight = hard_weight()
    rounded = q.quantize_fp8(weight)
    off = (q.dequantize_fp8(rounded) - weight).abs()
    assert (off <= torch.maximum(weight.abs() / 16, 2**-10 * rounded.scale[:, None]) * (1 + 1e-4)).all()


@pytest.mark.parametrize("group_size", q.GROUP_SIZES)
def test_int4_is_within_half_a_step_of_its_range(group_size):
    """The range is a group's own, or up to 12% of it shorter at each end; the offset keeps 8 bits."""
    weight = hard_weight()
    rounded = q.quantize_int4(weight, group_size)
    channel = rounded.channel[:, None]
    largest = torch.where(weight.any(1), weight.abs().amax(1), 1)[:, None]
    assert ((largest <= channel) & (channel < 2 * largest * (1 + 1e-6))).all()
    off = (q.dequantize_int4(rounded) - weight).abs()
    for i, group in enumerate(weight.split(group_size, dim=1)):
        span = (group.amax(1) - group.amin(1))[:, None]
        step = channel * rounded.scale[i].float()[:, None]
        slack = 2**-8 * channel * rounded.offset[i].float().abs()[:, None] + 1e-6 * largest
        assert (step <= span / 15 * (1 + 2**-6) + slack).all()
        low = channel * rounded.offset[i].float()[:, None]
        outside = torch.maximum(low - group, group - low - 15 * step).clamp(min=0)
        assert (outside <= 0.12 * span * (1 + 2**-6) + slack).all()
        off_here = off[:, i * group_size : (i + 1) * group_size]
        assert (off_here <= torch.where(outside > 0, outside + 1e-6 * largest, 0.5 * step + slack)).all()


def test_int4_is_better_than_rounding_between_the_extremes():
    weight = torch.randn(64, 512)
    groups = weight.double().unflatten(1, (-1, 128))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    plain = torch.round((groups - low) / (high - low) * 15) / 15 * (high - low) + low
    off = (q.dequantize_int4(q.quantize_int4(weight)) - weight).square().sum()
    assert off < 0.93 * (plain - groups).square().sum()


def test_codes_lie_as_the_module_says(form):
    """Each value looked up by the module's formula, one by one."""
    weight = torch.randn(2, 300)
    rounded = QUANTIZE[form](weight)
    words = rounded.codes.view(torch.int32) if form == "fp8" else rounded.words
    planes, bits = (4, 4) if form == "int4" else (2, 8)
    values = DEQUANTIZE[form](rounded)
    for n in range(2):
        for k in range(300):
            block, within = divmod(k, 128)
            plane, rest = divmod(within, 128 // planes)
            word = block * (128 // planes // 2) + rest // 2
            code = int(words[n, word]) >> (bits * plane + 16 * (rest % 2)) & (2**bits - 1)
            if form == "int8":
                value = (code - 128) * rounded.scale[n]
            elif form == "int4":
                value = (code * rounded.scale[block, n].float() + rounded.offset[block, n].float()) * rounded.channel[n]
            else:
                value = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float()[0] * rounded.scale[n]
            assert values[n, k] == value


def test_float8_activations(device):
    """Both sides rounded: each product is at most 1/16 off for x; columns meet in the right order."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no float8 tensor cores")
    weight = q.quantize_fp8(torch.randn(32, 200, device=device))
    x, bias = (torch.randn(*shape, device=device).bfloat16() for shape in ((5, 13, 200), (32,)))
    y = q.linear_fp8(x, weight, bias, fp8_activations=True)
    values = q.dequantize_fp8(weight)
    exact, magnitude = product(x, values, bias), product(x.abs(), values.abs())
    off = (y.double() - exact).abs()
    assert y.dtype == torch.bfloat16 and y.shape == (5, 13, 32)
    assert (off <= magnitude / 16 + 2**-8 * exact.abs()).all()
    assert not torch.equal(y, q.linear_fp8(x, weight, bias))
    assert off.square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


@pytest.mark.parametrize(
    ("asked", "rows", "dtype", "features", "taken"),
    [
        (True, 65, torch.bfloat16, 32, "both in float8"),
        (False, 65, torch.bfloat16, 32, "the weight alone"),
        (True, 64, torch.bfloat16, 32, "the weight alone"),
        (True, 65, torch.float16, 32, "the weight alone"),
        (True, 65, torch.bfloat16, 30, "the weight alone"),
    ],
)
def test_float8_activations_are_taken_where_they_can_be(asked, rows, dtype, features, taken, monkeypatch, device):
    """Which of the two products runs; neither does, as the interpreter has no bfloat16 for one of them."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no float8 tensor cores")
    ran = []
    for name, words in (("_scaled_product", "both in float8"), ("_linear", "the weight alone")):
        monkeypatch.setattr(q, name, lambda x, *_, words=words: ran.append(words) or x.new_zeros(rows, features))
    weight = q.quantize_fp8(torch.randn(features, 128, device=device))
    q.linear_fp8(torch.randn(rows, 128, device=device).to(dtype), weight, fp8_activations=asked)
    assert ran == [taken]


def test_reference_path(form, device):
    """Forced by name, and what a CPU runs: the definition."""
    import llava_kernels

    weight = QUANTIZE[form](torch.randn(6, 100, device=device))
    x = torch.randn(3, 100, device=device)
    with llava_kernels.implementation("reference"):
        assert torch.equal(LINEAR[form](x, weight), x @ DEQUANTIZE[form](weight).T)


def test_errors(form, device):
    weight = QUANTIZE[form](torch.randn(6, 100, device=device))
    x, linear = torch.randn(2, 100, device=device), LINEAR[form]
    with pytest.raises(ValueError, match=r"\(2, 99\) does not fit a weight of 100 input features"):
        linear(x[:, :99], weight)
    with pytest.raises(ValueError, match=r"\(5,\) does not fit 6 output features"):
        linear(x, weight, torch.zeros(5, device=device))
    with pytest.raises(TypeError, match="float64"):
        linear(x.double(), weight)
    with pytest.raises(TypeError, match=r"bias is torch\.float16"):
        linear(x, weight, torch.zeros(6, device=device).half())
    with pytest.raises(RuntimeError, match="no backward pass"):
        linear(x.clone().requires_grad_(), weight)
    with torch.no_grad():
        assert linear(x.clone().requires_grad_(), weight).shape == (2, 6)


def test_group_sizes_that_cannot_be_laid_out_are_refused():
    with pytest.raises(ValueError, match="group_size=32"):
        q.quantize_int4(torch.randn(4, 128), 32)


def test_opcheck(form, device):
    weight = QUANTIZE[form](torch.randn(6, 128, device=device))
    x, bias = torch.randn(2, 128, device=device), torch.randn(6, device=device)
    operator = getattr(torch.ops.llava_kernels, f"linear_{form}")
    fields = [
        v.view(torch.int32) if name == "codes" else v for name, v in vars(weight).items() if name != "in_features"
    ]
    torch.library.opcheck(operator, (x, *fields, bias, *([False] if form == "fp8" else [])))


def test_compiled(form, device):
    weight = QUANTIZE[form](torch.randn(6, 128, device=device))
    x = torch.randn(2, 128, device=device)
    compiled = torch.compile(lambda x: LINEAR[form](x, weight) + 1, backend="aot_eager")
    torch.testing.assert_close(compiled(x), LINEAR[form](x, weight) + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_cuda_graph(form, rows, device):
    weight = QUANTIZE[form](torch.randn(256, 2048, device=device))
    x = torch.randn(rows, 2048, device=device, dtype=torch.bfloat16)
    LINEAR[form](x, weight)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = LINEAR[form](x, weight)
    x.normal_()
    graph.replay()
    assert torch.equal(out, LINEAR[form](x, weight))
