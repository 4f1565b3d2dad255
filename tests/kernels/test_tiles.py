"""The table of block sizes, and the command that measures new rows for it."""

from __future__ import annotations

import importlib

import pytest
import torch

from llava_kernels.tiles import TABLE, assume, blocks_for, blocks_on, processors_of
from llava_kernels.tune import OutOfResources, main, time_each

TUNED = ("project_splice", "rms_norm", "swiglu")


@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("arch", [80, 90])
def test_rows_lie_in_rising_order_and_the_first_that_fits_is_taken(op, arch):
    bounds = [row.up_to for row in TABLE[op] if row.arch == arch]
    assert bounds and bounds == sorted(set(bounds))
    if len(bounds) > 1:
        assert blocks_on(op, arch, bounds[0]) == next(row.blocks for row in TABLE[op] if row.arch == arch)
        assert blocks_on(op, arch, bounds[0] + 1) == [row.blocks for row in TABLE[op] if row.arch == arch][1]


def test_callers_cannot_change_the_table():
    blocks_for("swiglu", torch.device("cpu"), 100)["BLOCK"] = 7
    assert blocks_for("swiglu", torch.device("cpu"), 100)["BLOCK"] != 7


def test_a_card_that_is_not_there():
    cpu = torch.device("cpu")
    for arch, processors in ((80, 108), (90, 132)):
        with assume(arch):
            assert blocks_for("linear_gelu", cpu, 576) == blocks_on("linear_gelu", arch, 576)
            assert processors_of(cpu) == processors
    assert processors_of(cpu) == 1


@pytest.mark.parametrize("op", TUNED)
def test_candidates_name_what_the_table_names(op):
    module = importlib.import_module(f"llava_kernels.{op}")
    for arch in (80, 90):
        assert all(blocks.keys() == blocks_on(op, arch, 4096).keys() for blocks in module.candidates(arch))


def test_each_candidate_is_launched_once_and_the_table_is_as_before():
    rows = TABLE["swiglu"]
    candidates = [{"BLOCK": 512, "num_warps": 2}, {"BLOCK": 7, "num_warps": 1}, {"BLOCK": 2048, "num_warps": 4}]

    def measure() -> float:
        block = blocks_for("swiglu", torch.device("cpu"), 11008)["BLOCK"]
        if block == 7:
            raise OutOfResources(1 << 20, 1 << 10, "shared memory")
        return 1 / block

    assert time_each("swiglu", 80, candidates, measure) == [(1 / 512, candidates[0]), (1 / 2048, candidates[2])]
    assert TABLE["swiglu"] is rows
    assert blocks_on("swiglu", 80, 11008) != candidates[0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("rms_norm", "--size", "4096"), 1, "error: block sizes are timed on a GPU, and torch finds none\n"),
        (("no_such_op", "--size", "1"), 2, "no_such_op lists no candidates"),
        (("dispatch", "--size", "1"), 2, "dispatch lists no candidates"),
    ],
)
def test_command_without_a_gpu_and_with_a_wrong_name(arguments, code, words, capsys):
    if code == 1 and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    else:
        assert main(arguments) == code
    assert words in capsys.readouterr().err
