"""The C library on the CPU: products against float64, under each instruction set that this machine has."""

import os
import signal
import time

import pytest
import torch

from llava_kernels import (
    dequantize_int4,
    dequantize_int8,
    library,
    quantize_int4,
    quantize_int8,
)

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")
SHAPES = [(1, 1), (5, 7), (13, 33), (50, 128), (97, 300), (128, 384)]  # (N, K)


def handle(instructions: str, threads: int) -> library.Handle:
    try:
        return library.Handle(threads, instructions)
    except library.LibraryError as error:
        pytest.skip(str(error))


def described(kind: str, weight: torch.Tensor, lk: library.Handle) -> tuple[library.Weight, torch.Tensor, object]:
    """The weight as the library takes it, its values, and what must stay alive."""
    if kind == "int8":
        int8 = quantize_int8(weight)
        return library.int8_weight(int8), dequantize_int8(int8), int8
    if kind.startswith("int4"):
        int4 = quantize_int4(weight, int(kind.split()[1]))
        pairs = library.group_pairs(int4) if kind.endswith("pairs") else None
        return library.int4_weight(int4, pairs), dequantize_int4(int4), (int4, pairs)
    kept = weight.to(getattr(torch, kind.split()[0]))
    taken = library.float_weight(kept)
    if kind != "bfloat16 compact" or lk.instructions == "portable":  # which reads none
        return taken, kept, kept
    compact = library.Compact(lk, taken)
    taken.compact = compact.address
    return taken, kept, (kept, compact)


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "bfloat16 compact", "int8", "int4 64", "int4 64 pairs", "int4 128 pairs"]
)
@pytest.mark.parametrize("instructions", library.INSTRUCTIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_linear(instructions, kind, threads):
    lk, generator = handle(instructions, threads), torch.Generator().manual_seed(0)
    for features, width in SHAPES:
        weight, values, _kept = described(kind, torch.randn(features, width, generator=generator), lk)
        for rows in (1, 2, 3, 4, 5, 9, 64, 65, 130):
            wide = torch.randn(rows, width + 3, generator=generator)
            x, bias = wide[:, :width], torch.randn(features, generator=generator)  # rows lie apart
            exact = x.double() @ values.double().T + bias
            size = x.double().abs() @ values.double().abs().T + bias.abs()  # what rounding errors are relative to
            # int8 and int4 meet activations of 16 bits: half a step of the largest of 128 a value
            tolerance = 3e-5 if kind.startswith("int") else 4e-7
            assert ((lk.linear(x, weight, bias) - exact).abs() <= tolerance * size.amax()).all(), (
                rows,
                features,
                width,
            )


def test_a_compact_weight_takes_three_quarters():
    weight = (torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    lk = library.Handle()
    if lk.instructions == "portable":
        with pytest.raises(library.LibraryError, match='"portable" do not read compact weights'):
            library.Compact(lk, library.float_weight(weight))
    else:
        assert 0.75 <= library.Compact(lk, library.float_weight(weight)).bytes / weight.nbytes < 0.78


def test_a_weight_of_too_many_powers_of_two_has_no_compact_form():
    weight = torch.logspace(-30, 30, 64 * 64, base=2).view(64, 64).bfloat16()
    with pytest.raises(library.LibraryError, match=r"16 commonest upper bytes|portable"):
        library.Compact(library.Handle(), library.float_weight(weight))


def test_pairs_hold_scales_and_offsets_side_by_side():
    weight = quantize_int4(torch.randn(6, 700, generator=torch.Generator().manual_seed(0)), 64)  # 11 groups
    halves = library.group_pairs(weight).view(torch.bfloat16).view(6, 16, 2)  # the lower half of a word lies first
    assert torch.equal(halves[:, :11, 1], weight.scale.T) and torch.equal(halves[:, :11, 0], weight.offset.T)
    assert not halves[:, 11:].any()


def test_linear_in_bfloat16():
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(24, 64).bfloat16()
    bias = torch.randn(24).bfloat16()
    found = library.Handle(2).linear(x, library.float_weight(weight), bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4 128"])
def test_tiles_give_a_row_the_same_whatever_comes_with_it(kind):
    """In AMX's tiles a sum is added up in one order; 8 and 4 bits meet them from five rows on."""
    lk, generator = handle("amx", 2), torch.Generator().manual_seed(1)
    weight, _values, _kept = described(kind, torch.randn(100, 600, generator=generator))
    x = torch.randn(200, 600, generator=generator).bfloat16()
    together = lk.linear(x, weight)
    for rows in (1, 5, 40, 64, 130) if kind == "bfloat16" else (5, 40, 64, 130):
        assert torch.equal(lk.linear(x[-rows:], weight), together[-rows:])


def test_what_cannot_be_is_refused():
    lk = library.Handle(1)
    with pytest.raises(library.LibraryError, match='instructions "vax"'):
        library.Handle(1, "vax")
    with pytest.raises(library.LibraryError, match="threads is 5000"):
        library.Handle(5000)
    weight = library.float_weight(torch.zeros(4, 4))
    weight.format = 9
    with pytest.raises(library.LibraryError, match="no weight format 9"):
        lk.linear(torch.zeros(1, 4), weight)


def test_a_forked_child_computes_alone_and_lets_go():
    lk, x, weight = library.Handle(3), torch.ones(2, 64), torch.ones(200, 64)
    described = library.float_weight(weight)
    assert (lk.linear(x, described) == 64).all()
    child = os.fork()
    if child == 0:
        right = bool((lk.linear(x, described) == 64).all())
        del lk
        os._exit(0 if right else 1)
    for _ in range(200):  # seconds / 20
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0
