"""Breaks each kernel in one line and requires a test to notice.

    python tests/kernels/mutate.py              every break that tests/kernels/mutations/*.py list
    python tests/kernels/mutate.py --only rope  those of one op

A list is ``MUTATIONS = [(file, fragment, broken fragment, test), ...]``: file in the repository, a fragment that occurs
once in it, and the test that must fail once it is replaced. The breaks are made in a temporary copy. Ends with 1 if a
test passes all the same, or fails before anything is broken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from runpy import run_path
from subprocess import PIPE
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds a test
PASSED, FAILED = 0, 1  # pytest's exit codes
CRASHED = -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT  # memory outside the tensors was read or written


class Mutation(NamedTuple):
    file: str
    fragment: str
    broken: str
    test: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="OP", help="the list of one op, such as rope")
    only = parser.parse_args().only
    lists = sorted((REPOSITORY / "tests/kernels/mutations").glob(f"{only or '*'}.py"))
    if not lists:
        parser.error(f"there is no tests/kernels/mutations/{only or '*'}.py")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), "kernels", "tests/kernels", module="llava_kernels")
        survivors = [line for path in lists for line in bench.lines(path)]
    print(f"{len(survivors)} not noticed" if survivors else "every break is noticed")
    return 1 if survivors else 0


class Bench:
    """A copy of packages and their tests, in which lines are broken and mended again."""

    def __init__(self, folder: Path, *parts: str, module: str) -> None:
        self.folder = folder
        for part in parts:
            shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
            if (REPOSITORY / file).exists():
                shutil.copy(REPOSITORY / file, folder / file)
        where = self.python("-c", f"import {module}; print({module}.__file__)").stdout
        if not where.startswith(str(folder)):
            raise RuntimeError(f"the copy is not what is imported, but {where or 'nothing'}")
        self.passing: set[str] = set()  # tests that pass with nothing broken

    def lines(self, path: Path, only: str = "") -> Iterator[str]:
        """Tries a list of mutations, prints a line for each, yields those of the tests that do not notice.

        only: a part of the file, of the broken fragment or of the test that those to try have.
        """
        for mutation in map(Mutation._make, run_path(str(path))["MUTATIONS"]):
            if only not in "\n".join((mutation.file, mutation.broken, mutation.test)):
                continue
            started = time.perf_counter()
            verdict = self.verdict(mutation)
            broken = " ".join(mutation.broken.split())[:60]
            line = f"{verdict:<8} {path.stem:<22} {broken:<60} {mutation.test.split('::')[-1]}"
            print(f"{line}  {time.perf_counter() - started:.0f} s", flush=True)
            if verdict != "noticed":
                yield line

    def verdict(self, mutation: Mutation) -> str:
        file = self.folder / mutation.file
        whole = file.read_text()
        if (places := whole.count(mutation.fragment)) != 1:
            return f"{places} PLACES"  # the fragment must name one
        if mutation.test not in self.passing and self.run(mutation.test) != PASSED:
            return "FAILS"  # or is not there, with nothing broken
        self.passing.add(mutation.test)
        try:
            file.write_text(whole.replace(mutation.fragment, mutation.broken))
            code = self.run(mutation.test)
            if code == PASSED:
                return "SURVIVED"
            # Another code: the break is one of syntax, and the test never ran.
            return "noticed" if code in (FAILED, *CRASHED) else "INVALID"
        finally:
            file.write_text(whole)

    def run(self, test: str) -> int:
        return self.python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test).returncode

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # -S, because an editable install would put the working tree's package before the copy's.
        path = [
            f"{self.folder}/kernels",
            str(self.folder),
            sysconfig.get_path("purelib"),
            sysconfig.get_path("platlib"),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-S", *arguments]
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
        ) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT)
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:  # a loop that no longer ends has been noticed
                return subprocess.CompletedProcess(command, FAILED, "", "timed out")
            finally:
                end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Ends what a broken test has left running; asks first, because torchrun then ends workers of other sessions."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(300):
            time.sleep(0.1)
            process.poll()
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)


def try_list(path: Path, *parts: str) -> int:
    """Tries what the list beside a package's tests holds, or the part of it that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", metavar="WORD", default="", help="those with this in file, broken line or test")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), *parts, module="llava_fast")
        survivors = list(bench.lines(path, only))
    print(f"{len(survivors)} not noticed" if survivors else "every break is noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
