"""Quantised products beside the same product with the weight in the compute dtype, and beside torch's own packed ones.

Every side has the same quantised values. ``eager`` reads them in the compute dtype, dequantised beforehand: what a
server without quantisation runs. ``torch`` is the product that torch carries for the format, where it runs here.
"""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.ceiling import matmul_ceiling
from benches.memory_bound import DEVICE, DTYPE, GPU, TOLERANCE, measure, noise
from llava_kernels import quantized_linear as q

# (out, in): LLaVA 7B's qkv, attention output, gate and up, down, head
SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)] if GPU else [(256, 384)]
COPIES = 16 if GPU else 1
ROWS = [1, 8, 64, 2048] if GPU else [1, 8]
FORMATS = {
    "int8": (q.quantize_int8, q.dequantize_int8, q.linear_int8),
    "int4": (q.quantize_int4, q.dequantize_int4, q.linear_int4),
    "fp8": (q.quantize_fp8, q.dequantize_fp8, q.linear_fp8),
}


def torchs_int8(weight: q.Int8Weight):
    codes = (q.dequantize_int8(weight) / weight.scale[:, None]).round().to(torch.int8)
    scale = weight.scale.to(DTYPE)
    return lambda x: torch._weight_int8pack_mm(x, codes, scale)


def torchs_int4(weight: q.Int4Weight):
    """Torch's own format: ``(code - 8) * scale + zero``, both in bfloat16, which is its only dtype on a GPU."""
    channel, scale, offset = weight.channel, weight.scale.float(), weight.offset.float()
    zero = channel * (offset + 8 * scale)
    both = torch.stack([channel * scale, zero], dim=2).to(torch.bfloat16 if GPU else DTYPE)  # (G, N, 2)
    values = q.dequantize_int4(weight).unflatten(1, (-1, weight.group_size)) / channel[:, None, None]
    codes = ((values - offset.t()[:, :, None]) / scale.t()[:, :, None]).round().flatten(1).to(torch.int32)
    if GPU:
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        return lambda x: torch._weight_int4pack_mm(x, packed, weight.group_size, both)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, weight.group_size, both)


def make(impl: str, form: str, shape: tuple[int, int], rows: int):
    """A function without arguments that does the product and returns it, each time with the next copy of the weight.

    The copies are more than a GPU's cache holds, as the layers of a model are.
    """
    torch.manual_seed(0)
    weight = FORMATS[form][0](torch.randn(shape, device=DEVICE) / 50)
    x = noise(rows, shape[1])
    products = cycle([product(impl, form, copy(weight), x) for _ in range(COPIES)])
    return lambda: next(products)()


def copy(weight):
    return type(weight)(*(v.clone() if isinstance(v, Tensor) else v for v in vars(weight).values()))


def product(impl: str, form: str, weight, x: Tensor):
    _, dequantize, linear = FORMATS[form]
    if impl == "ours":
        return lambda: linear(x, weight)
    if impl == "ours, x in fp8":
        return lambda: q.linear_fp8(x, weight, fp8_activations=True)
    if impl == "torch":
        torchs = {"int8": torchs_int8, "int4": torchs_int4}[form](weight)
        return lambda: torchs(x)
    values = dequantize(weight).to(DTYPE)
    return lambda: F.linear(x, values)


def result(impl: str, form: str, shape: tuple[int, int], rows: int) -> Tensor:
    try:
        return make(impl, form, shape, rows)()
    except (RuntimeError, NotImplementedError) as error:
        if impl != "torch":
            raise
        pytest.skip(f"torch's own product does not run here: {str(error).splitlines()[0]}")


def rivals() -> list[tuple[str, str, int]]:
    impls = [(form, impl) for form in FORMATS for impl in ("ours", "eager", "torch")]
    impls.remove(("fp8", "torch"))
    cases = [(form, impl, rows) for form, impl in impls for rows in ROWS]
    return cases + [("fp8", "ours, x in fp8", rows) for rows in ROWS if rows > q.FEW_ROWS]


@pytest.mark.parametrize(("form", "impl", "rows"), rivals())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_quantized_linear(benchmark, shape, form, impl, rows):
    if "fp8" in impl and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no float8 tensor cores")
    # Rounding x to float8 leaves an error of a few percent, by design.
    tolerance = {"rtol": 0.1, "atol": 0.5} if impl == "ours, x in fp8" else TOLERANCE
    torch.testing.assert_close(result(impl, form, shape, rows), result("eager", form, shape, rows), **tolerance)
    benchmark.group = f"{form}, {rows} x {shape[1]} by {shape[0]} x {shape[1]}"
    bits = 8 * DTYPE.itemsize if impl == "eager" else {"int8": 8, "int4": 4.25, "fp8": 8}[form]
    moved = int(shape[0] * shape[1] * bits / 8) + rows * sum(shape) * DTYPE.itemsize
    measure(benchmark, lambda: make(impl, form, shape, rows), moved, (rows, *shape))
    if rows > q.FEW_ROWS and "gb_per_s" in benchmark.extra_info:  # bound by arithmetic, not by memory
        rate = 2 * rows * shape[0] * shape[1] * benchmark.extra_info["gb_per_s"] * 1e9 / moved
        benchmark.extra_info["tflop_per_s"] = rate / 1e12
        benchmark.extra_info["of_matmul_ceiling"] = rate / matmul_ceiling(DEVICE, DTYPE)
