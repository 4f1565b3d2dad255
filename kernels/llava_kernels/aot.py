"""Compile every kernel at its production block sizes for A100 and H100, with no GPU and no CUDA toolkit present.

python -m llava_kernels.aot --report                 registers, spills, shared memory and instruction counts
python -m llava_kernels.aot --json compiled.json     the same as a list, for programs
python -m llava_kernels.aot --out build/cubins       the cubins, and C source that embeds them (embed.py)
python -m llava_kernels.aot --cache DIR              Triton's cache, for engines to start without compiling (ahead.py)
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import triton

import llava_kernels
from llava_kernels.ahead import fill
from llava_kernels.build import ARCHS, Build, Compiled, compile_for
from llava_kernels.embed import c_source
from llava_kernels.report import rows as report_rows

WORKERS = 2  # the compiler takes a few hundred MB for the largest kernels
MANY = 8  # kernels that take longer to compile than processes take to begin


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--report", action="store_true", help="print the table (done also when nothing else is asked)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table as a JSON list")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the cubins, and kernels.c that embeds them")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="compile what LLaVA-1.5 7B and 13B launch while they answer into Triton's cache in DIR; set "
        "TRITON_CACHE_DIR=DIR where they run, and leave DIR where it is",
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="default: all")
    parser.add_argument("--only", default="", metavar="PATTERN", help="kernels whose name matches this expression")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"):
        # Under the interpreter @triton.jit makes functions that the compiler cannot read.
        parser.error("TRITON_INTERPRET is set; unset it, because interpreted kernels cannot be compiled")
    try:
        if options.cache:
            fill_cache(options.cache, options.arch, options.only)
            if not (options.report or options.json or options.out):
                return 0
        compiled = compile_all(options.arch, options.only)
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = options.report or not (options.json or options.out)
    rows = report_rows(compiled) if options.json or report else []
    if options.json:
        write(options.json, json.dumps(rows, indent=1) + "\n")
    if options.out:
        for one in compiled:
            write(options.out / f"{one.name}.sm_{one.arch}.cubin", one.cubin)
        write(options.out / "kernels.c", c_source(compiled))
    if report:
        print(table(rows))
    return 0


class CompileError(Exception):
    """A kernel does not compile, or there is none to compile."""


@cache
def collect(arch: int) -> dict[str, Build]:
    """Every kernel of the package by its name: what the modules' own ``builds(arch)`` list.

    Raises:
        CompileError: two of them have the same name.
    """
    found: dict[str, Build] = {}
    for module in pkgutil.walk_packages(llava_kernels.__path__, "llava_kernels."):
        if module.name.endswith(".libllava_kernels"):  # the C library, installed beside the modules: not one of them
            continue
        listed = getattr(importlib.import_module(module.name), "builds", None)
        for build in listed(arch) if listed else ():
            if build.name in found:
                raise CompileError(f"{module.name}: another kernel is named {build.name} already")
            found[build.name] = build
    return found


def compile_all(archs: Sequence[int] = ARCHS, only: str = "") -> list[Compiled]:
    """The kernels whose name matches the regular expression ``only``; many are compiled in processes of their own.

    Raises:
        CompileError: no name matches, or kernels do not compile: it tells of all of them.
    """
    jobs = [(name, arch) for arch in archs for name in collect(arch) if re.search(only, name)]
    if not jobs:
        raise CompileError(f"no kernel's name matches {only!r}")
    if len(jobs) < MANY:
        results = [compile_one(*job) for job in jobs]
    else:  # spawned, not forked: torch has threads by now
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(compile_one, *zip(*jobs, strict=True)))
    if failures := [result for result in results if isinstance(result, str)]:
        raise CompileError("\n".join(failures))
    return [result for result in results if isinstance(result, Compiled)]


def fill_cache(folder: Path, archs: Sequence[int], only: str) -> None:
    """ahead.fill, and a line that says what it did.

    Raises:
        CompileError: no name matches, or kernels do not compile.
    """
    count, failures = fill(folder, archs, only, WORKERS)
    if failures or not count:
        raise CompileError("\n".join(failures) or f"no kernel's name matches {only!r}")
    print(
        f"{count} kernels for {', '.join(f'sm_{arch}' for arch in archs)} are in {folder}; Triton {triton.__version__}"
    )


def compile_one(name: str, arch: int) -> Compiled | str:
    """By name, because a ``@triton.jit`` function does not travel to another process. Of a failure, the words."""
    try:
        return compile_for(collect(arch)[name], arch)
    except Exception as error:
        return f"{name} does not compile for sm_{arch}: {type(error).__name__}: {error}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    # Words (kernel, arch, kind) to the left, numbers to the right.
    widths = [max(map(len, column)) * (-1 if i < 3 else 1) for i, column in enumerate(zip(*lines, strict=True))]
    return "\n".join("  ".join(f"%{w}s" % cell for cell, w in zip(line, widths, strict=True)) for line in lines)


def write(path: Path, content: str | bytes) -> None:
    """All or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
