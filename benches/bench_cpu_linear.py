"""``linear`` of the C library on a CPU beside torch's, for the largest weights of 160M, 1B and 7B decoders.

``gb_per_s`` counts the weight's bytes, which is what has to be read; ``share_of_read_bandwidth`` sets it beside what
the same threads read out of memory: the median of rounds, each with a reading right before it. A machine that is shared
with others reads half as fast in one minute as in the next, and a product of one moment beside a reading of another
would compare the two moments. Who multiplies reads, the library by dot products or torch by a sum, and where the other
one reads faster, alternating, the readings are scaled up to that. A time in the table is that of a round: ``CALLS``
products one after another, or so many that they read as much as a reading does.
The library gets arguments that were made before, one call after another from C, as in its own decoder: Python between
two calls takes 3 to 5 us out of a cold cache (Zen 3), of some 85. (Through ``Handle.linear``, which makes arguments and
result anew, a call takes some 15 us more.) Without a C compiler it is Python that calls: ``called_from``.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from ctypes import CDLL, addressof, byref, c_void_p, cast, sizeof
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path

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
# Bytes a weight, beside SCALE bytes a feature of integers. In its compact form one of bfloat16 has 12 bits, which one
# or two rows meet.
KINDS = {"float32": 4.0, "bfloat16": 2.0, "bfloat16 compact": 1.5, "int8": 1.0, "int4": 0.5 + 4 / 128}
COARSE = "int4, activations of 8 bits"  # as a bfloat16 model's; those of int8 and int4 alone have 16
KINDS[COARSE] = KINDS["int4"]
SCALE = 4
COLD = 192 << 20  # bytes of weights that are gone through in turn, so that none is still in a cache
CALLS = 8  # a round, at least: in decoding, too, one product follows another before the threads fall asleep
READ = 32 << 20  # bytes of a reading
LOOP = """
int loop(int (*call)(void *, void *, void *), void *handle, void **args, int count) {
    int status = 0;
    for (int i = 0; i < count && !status; i++) status = call(handle, args[i], 0);
    return status;
}
"""


@cache
def c_loop() -> Callable[..., int] | None:
    """LOOP compiled, where there is a compiler."""
    if not shutil.which("cc"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "loop.c"), Path(folder, "loop.so")
        source.write_text(LOOP)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", made], check=True)
        return CDLL(str(made)).loop


def rounds_of(handle: library.Handle, calls: list[library.LinearArgs], count: int) -> Callable[[], None]:
    """Makes ``count`` of the products, from C if possible: where the last round ended, and over again."""
    loop, starts = c_loop(), cycle(range(0, len(calls) * count, count))
    if loop is None:
        return in_python([partial(handle.run_linear, one) for one in calls], count)
    addresses = [addressof(one) for one in islice(cycle(calls), len(calls) + count)]
    array = (c_void_p * len(addresses))(*addresses)
    linear = cast(handle.library.lk_linear, c_void_p)

    def one_after_another() -> None:
        start = next(starts) % len(calls)
        handle.check(loop(linear, handle._handle, byref(array, start * sizeof(c_void_p)), count))

    return one_after_another


def in_python(products: list[Callable[[], object]], count: int) -> Callable[[], None]:
    turn = cycle(products)

    def one_after_another() -> None:
        for product in islice(turn, count):
            product()

    return one_after_another


@cache
def what_is_read() -> tuple[torch.Tensor, list[library.Weight]]:
    parts = torch.ones(4, READ // 4 // 4096, 4096)
    return parts, [library.float_weight(part) for part in parts]


class Readings:
    """GB/s out of memory, one reading a call: dot products with rows that lie there, or torch's sum of them.

    The dot products are by the handle of the products: threads of another would wait for more work on its cores.
    """

    def __init__(self, impl: str, handle: library.Handle):
        parts, weights = what_is_read()
        row, out = torch.ones(1, parts.shape[2]), torch.empty(1, parts.shape[1])
        calls = [_arguments(row, weight, out) for weight in weights]
        self.reads = {
            "ours": [partial(handle.run_linear, one) for one in calls],
            "torch": [part.sum for part in parts],
        }[impl]
        self.rates, self.kept = list[float](), (row, out, calls)

    def __call__(self) -> None:
        read = self.reads[len(self.rates) % len(self.reads)]
        start = time.perf_counter()
        read()
        self.rates.append(READ / (time.perf_counter() - start) / 1e9)


def best_of_three(readings: Readings) -> float:
    time.sleep(0.01)  # threads of others wait for more work on a core for a while
    for _ in range(3):
        readings()  # the first one wakes threads
    return max(readings.rates[-3:])


def _arguments(x: torch.Tensor, weight: library.Weight, out: torch.Tensor, bits: int = 0) -> library.LinearArgs:
    return library.LinearArgs(
        dtype=library.DTYPES[x.dtype],
        rows=len(x),
        weight=weight,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        activation_bits=bits,
    )


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
    size = int(features * (width * KINDS[kind] + SCALE * kind.startswith("int")))
    copies = max(1, COLD // size) if benchmark.enabled else 1
    x, handle = torch.randn(rows, width), library.Handle()
    compact = []
    if kind.startswith("bfloat16") or kind == COARSE:
        x = x.bfloat16()
    if not kind.startswith("int"):
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
        }[kind[:4]]
        first = quantize(weight)
        values = back(first)
        kept = [first] + [type(first)(**{n: _copy(v) for n, v in vars(first).items()}) for _ in range(copies - 1)]
        pairs = [library.group_pairs(one) for one in kept] if kind != "int8" else []
        weights = [take(*one) for one in zip(kept, pairs, strict=True)] if pairs else [take(one) for one in kept]
    exact = x.double() @ values.double().T
    out = torch.empty(rows, features, dtype=x.dtype)
    calls = [_arguments(x, one, out, 8 if kind == COARSE else 0) for one in weights]
    handle.run_linear(calls[0])
    error = (out.double() - exact).abs().amax()
    bound = 2**-6 if kind == COARSE else 2**-7 if x.dtype == torch.bfloat16 else 1e-4
    assert error <= bound * exact.abs().amax()

    count = max(CALLS, READ // size) if benchmark.enabled else 1
    if impl == "ours":
        one_after_another = rounds_of(handle, calls, count)
    else:
        one_after_another = in_python([partial(F.linear, x, one) for one in kept], count)
    if not benchmark.enabled:
        return benchmark(one_after_another)
    readings, other = Readings(impl, handle), Readings("torch" if impl == "ours" else "ours", handle)
    faster = statistics.median(best_of_three(other) / best_of_three(readings) for _ in range(10))
    benchmark.pedantic(one_after_another, setup=readings, rounds=max(10, copies), warmup_rounds=2)
    rates = [count * size / seconds / 1e9 for seconds in benchmark.stats.stats.data]
    ceilings = [max(1, faster) * read for read in readings.rates[-len(rates) :]]
    benchmark.extra_info |= {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "called_from": "C" if impl == "ours" and c_loop() else "Python",
        "instructions": handle.instructions if impl == "ours" else "",
        "gb_per_s": statistics.median(rates),
        "share_of_read_bandwidth": statistics.median(a / b for a, b in zip(rates, ceilings, strict=True)),
        "read_gb_per_s": statistics.median(ceilings),
    }


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value
