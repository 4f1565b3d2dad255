"""Every kernel at its production block sizes, compiled for A100 and H100 with no GPU, and what the machine code shows.

The compiler runs in a process of its own, because in this one kernels may be interpreted. What it compiled stays in
Triton's cache. triton_versions.sh runs this file again under the other release of Triton that is supported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import llava_kernels
from llava_kernels.aot import main
from llava_kernels.build import ARCHS, SHARED_LIMIT

NOT_INTERPRETED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def aot(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava_kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=NOT_INTERPRETED, timeout=1800)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("aot") / "compiled.json"
    done = aot("--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def failing(rows: list[dict], holds) -> list[dict]:
    """Whole rows, so that a failure shows what the kernel has instead."""
    return [row for row in rows if not holds(row)]


def test_every_module_with_kernels_is_compiled_for_both_cards(rows):
    """Each lists its own; none is forgotten."""
    names = {arch: {row["kernel"] for row in rows if row["arch"] == f"sm_{arch}"} for arch in ARCHS}
    texts = {path.name: path.read_text() for path in Path(llava_kernels.__file__).parent.rglob("*.py")}
    sources = [name for name, text in texts.items() if "\n@triton.jit" in text]
    without = [name for name in sources if "\ndef builds(arch: int)" not in texts[name]]
    assert sources and not without
    assert len(rows) == sum(map(len, names.values()))  # no name twice
    assert all(len(found) >= len(sources) for found in names.values())


def test_no_kernel_spills_registers(rows):
    assert not failing(rows, lambda row: row["spills"] == 0)


def test_shared_memory_is_within_the_cards_limit(rows):
    assert not failing(rows, lambda row: row["shared_bytes"] <= SHARED_LIMIT[int(row["arch"][3:])])


def test_matrix_products_run_on_tensor_cores(rows):
    """Hopper's asynchronous ones on sm_90; on sm_80 Ampere's, fed by asynchronous copies."""
    gemms = [row for row in rows if row["kind"] == "gemm"]
    assert gemms
    assert not failing([row for row in gemms if row["arch"] == "sm_90"], lambda row: row["HGMMA"] > 0)
    assert not failing([row for row in gemms if row["arch"] == "sm_80"], lambda row: row["HMMA"] and row["LDGSTS"])


def test_memory_bound_kernels_load_16_bytes_at_once(rows):
    memory = [row for row in rows if row["kind"] == "memory"]
    assert memory
    assert not failing(memory, lambda row: row["LDG.128"] > 0)


def test_report_is_a_table_of_the_same():
    done = aot("--report", "--arch", "90", "--only", "^swiglu_forward")
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.splitlines()
    assert title.split()[:6] == ["kernel", "arch", "kind", "registers", "spills", "shared_bytes"]
    assert lines and all(line.split()[1] == "sm_90" and line.startswith("swiglu_forward") for line in lines)


def test_cubins_and_the_source_that_embeds_them(tmp_path):
    done = aot("--out", str(tmp_path), "--arch", "80", "--only", "^swiglu_forward")
    assert done.returncode == 0, done.stderr
    cubins, source = list(tmp_path.glob("*.sm_80.cubin")), (tmp_path / "kernels.c").read_text()
    assert cubins and sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [path.name for path in cubins] + ["kernels.c"]
    )
    for path in cubins:
        words = path.read_bytes()
        assert words.startswith(b"\x7fELF")
        assert ",".join(hex(int.from_bytes(words[i : i + 8], "little")) for i in range(0, 80, 8)) in source
        # What the C library passes: the arguments listed, then two pointers to scratch memory.
        (listed,) = re.findall(r"lk_argument \w+\[\] = \{(.*)\};", source)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        elf = subprocess.run([tool, "-elf", path], capture_output=True, text=True, check=True).stdout
        assert elf.count("EIATTR_KPARAM_INFO") == listed.count("{") + 2


@pytest.mark.parametrize(
    ("arguments", "interpreted", "code", "words"),
    [
        (["--report"], "1", 2, "TRITON_INTERPRET is set"),
        (["--only", "no_such_kernel"], "0", 1, "no kernel's name matches"),
        (["--arch", "75"], "0", 2, "invalid choice"),
    ],
    ids=["interpreter", "name", "arch"],
)
def test_errors_say_what_is_wrong(arguments, interpreted, code, words, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    try:
        assert main(arguments) == code
    except SystemExit as ended:  # argparse's way
        assert ended.code == code
    assert words in capsys.readouterr().err
