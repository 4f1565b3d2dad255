"""``linear`` of the C library on a CPU beside torch's, for the largest weights of 160M, 1B and 7B decoders.

``gb_per_s`` counts the weight's bytes, which is what has to be read; ``share_of_read_bandwidth`` sets it beside what
the same threads read out of memory right before and after. Both are medians: a machine that is shared with others reads
half as fast in one minute as in the next, and a best of one beside a median of the other would compare two minutes.
The library gets arguments that were made before, as its own decoder has them: through ``Handle.linear``, which makes
them and the result anew, a call takes some 15 us more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from llava_kernels import (
    dequantize_int4,
    dequantize_int8,
    library,
    quantize_int4,
    quantize_int8,
)

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")
SHAPES = {"160M": (4096, 768), "1B": (11264, 2048), "7B": (22016, 4096)}  # (N, K) of the gate/up product
# Bytes a weight. In its compact form one of bfloat16 has 12 bits, which one or two rows meet.
KINDS = {"float32": 4.0, "bfloat16": 2.0, "bfloat16 compact": 1.5, "int8": 1.0, "int4": 0.5 + 4 / 128}
COLD = 192 << 20  # bytes of weights that are gone through in turn, so that none is still in a cache


@cache
def long_rows() -> tuple[torch.Tensor, library.Handle, torch.Tensor]:
    return torch.ones(1 << 13, 1 << 12), library.Handle(), torch.ones(1, 1 << 12)


def reads() -> list[list[float]]:
    """GB/s out of 128 MiB that no cache holds, ten times by torch's sum and ten times by dot products with its rows."""
    large, handle, row = long_rows()
    weight, rates = library.float_weight(large), []
    for read in (large.sum, lambda: handle.linear(row, weight)):
        time.sleep(0.1)  # threads of OpenMP wait for more work on a core for a while
        rates.append([large.nbytes / _seconds(read) / 1e9 for _ in range(10)])
    return rates


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.mark.parametrize("impl", ["ours", "torch"])
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_linear(benchmark, shape, kind, rows, impl):
    benchmark.group = f"linear on a CPU, {shape} {SHAPES[shape]}, {kind}, {rows} rows"
    if kind == "bfloat16 compact" and (impl == "torch" or rows > 2):
        pytest.skip("of bfloat16 this is the same product")
    if impl == "torch" and kind.startswith("int"):
        pytest.skip("torch has no product with these weights; its reference makes float32 ones first")
    features, width = SHAPES[shape] if benchmark.enabled else (96, 256)
    weight = torch.randn(features, width) / width**0.5
    size = int(features * width * KINDS[kind])
    copies = max(1, COLD // size) if benchmark.enabled else 1
    x, handle = torch.randn(rows, width), library.Handle()
    compact = []
    if not kind.startswith("int"):
        x = x.to(torch.float32 if kind == "float32" else torch.bfloat16)
        kept = [weight.to(x.dtype, copy=True) for _ in range(copies)]
        values, weights = kept[0], [library.float_weight(one) for one in kept]
        if kind == "bfloat16 compact":
            compact = [library.Compact(handle, one) for one in weights]
            for one, form in zip(weights, compact, strict=True):
                one.compact = form.address
    else:
        quantize, take, back = {
            "int8": (quantize_int8, library.int8_weight, dequantize_int8),
            "int4": (quantize_int4, library.int4_weight, dequantize_int4),
        }[kind]
        first = quantize(weight)
        values = back(first)
        kept = [first] + [type(first)(**{n: _copy(v) for n, v in vars(first).items()}) for _ in range(copies - 1)]
        pairs = [library.group_pairs(one) for one in kept] if kind == "int4" else []
        weights = [take(*one) for one in zip(kept, pairs, strict=True)] if pairs else [take(one) for one in kept]
    exact = x.double() @ values.double().T
    error = (handle.linear(x, weights[0]).double() - exact).abs().amax()
    assert error <= (2**-7 if x.dtype == torch.bfloat16 else 1e-4) * exact.abs().amax()

    out = torch.empty(rows, features, dtype=x.dtype)
    calls = [
        library.LinearArgs(
            dtype=library.DTYPES[x.dtype],
            rows=rows,
            weight=one,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            out=out.data_ptr(),
            out_stride=features,
        )
        for one in weights
    ]
    turn = iter(range(1 << 30))
    work = {
        "ours": lambda: handle.run_linear(calls[next(turn) % copies]),
        "torch": lambda: F.linear(x, kept[next(turn) % copies]),
    }[impl]
    read = reads() if benchmark.enabled else []
    # Eight calls a round: in decoding, too, one product follows another before the threads fall asleep.
    benchmark.pedantic(work, rounds=max(10, copies // 4), iterations=8, warmup_rounds=2)
    if benchmark.stats is None:
        return
    rate = size / benchmark.stats.stats.median / 1e9
    ceiling = max(statistics.median(before + after) for before, after in zip(read, reads(), strict=True))
    benchmark.extra_info |= {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "instructions": handle.instructions if impl == "ours" else "",
        "gb_per_s": rate,
        "share_of_read_bandwidth": rate / ceiling,
        "read_gb_per_s": ceiling,
    }


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value
