"""Time an op's candidate block sizes on this machine's GPU and print a row for tiles.TABLE.

python -m llava_kernels.tune rms_norm --size 4096
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from llava_kernels import tiles
from llava_kernels.tiles import ANY, TABLE, Row, arch_of, blocks_on


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the row of the fastest candidate. An op's module offers ``candidates`` and ``tuning_case`` for this."""
    parser = argparse.ArgumentParser(prog="python -m llava_kernels.tune", description="Time block sizes on this GPU.")
    parser.add_argument("op", help="such as rms_norm: a module of llava_kernels that lists candidates")
    parser.add_argument("--size", type=int, required=True, help="what the op's comment in TABLE says, such as 4096")
    options = parser.parse_args(arguments)
    found = options.op.isidentifier() and importlib.util.find_spec(f"llava_kernels.{options.op}")
    module = importlib.import_module(f"llava_kernels.{options.op}") if found else None
    if module is None or not hasattr(module, "tuning_case"):
        parser.error(f"{options.op} lists no candidates")
    if not torch.cuda.is_available():
        print("error: block sizes are timed on a GPU, and torch finds none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    arch = arch_of(device)
    candidates = [blocks_on(options.op, arch, options.size), *module.candidates(arch)]
    work = module.tuning_case(options.size, device)
    times = time_each(options.op, arch, candidates, lambda: do_bench(work, return_mode="median"))
    for milliseconds, blocks in times:
        print(f"{milliseconds * 1000:9.1f} us  {blocks}")
    if not times:
        print("error: none of the candidates runs on this card", file=sys.stderr)
        return 1
    _, best = min(times, key=lambda pair: pair[0])
    print(f"{torch.cuda.get_device_name(device)}, the first line is the table's row now. The fastest:")
    print(f"Row({arch}, {options.size}, {best}),")
    return 0


def time_each(
    op: str, arch: int, candidates: Sequence[dict[str, int]], measure: Callable[[], float]
) -> list[tuple[float, dict[str, int]]]:
    """What ``measure`` returns with each candidate of ``op`` that fits the card, and the candidate."""
    times = []
    for blocks in candidates:
        with instead(op, Row(arch, ANY, blocks)), suppress(OutOfResources):
            times.append((measure(), blocks))
    return times


@contextmanager
def instead(op: str, row: Row) -> Iterator[None]:
    """Within the block the op has this row alone."""
    rows = TABLE[op]
    TABLE[op] = (row,)
    tiles._blocks.cache_clear()
    try:
        yield
    finally:
        TABLE[op] = rows
        tiles._blocks.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
