"""What compiled kernels take of the card, and which instructions they are made of: read from their machine code.

The tools are those that Triton's package carries. nvdisasm takes half a second to start, so it gets the code of all
kernels for a card as one.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from llava_kernels.build import Compiled

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DISASSEMBLE_AS = {80: "SM80", 90: "SM90a"}
INSTRUCTIONS = {  # LDGSTS: asynchronous copies
    "HGMMA": r"\bHGMMA\.",
    "HMMA": r"\bHMMA\.",
    "LDGSTS": r"\bLDGSTS\.",
    "UTMALDG": r"\bUTMALDG\.",
    "LDG.128": r"\bLDG\.\S*128\b",
    "STG.128": r"\bSTG\.\S*128\b",
}


def rows(compiled: Sequence[Compiled]) -> list[dict[str, Any]]:
    """A line of the report for each: ``registers`` a thread, ``spills`` bytes of local memory a thread (stack and
    spilled registers), ``shared_bytes`` a block, and how often each of :data:`INSTRUCTIONS` occurs."""
    text: dict[tuple[str, int], str] = {}
    for arch in {one.arch for one in compiled}:
        of_arch = [one for one in compiled if one.arch == arch]
        text |= zip(((one.name, arch) for one in of_arch), disassemble(of_arch), strict=True)
    return [
        {
            "kernel": one.name,
            "arch": f"sm_{one.arch}",
            "kind": one.kind,
            **usage(one.cubin),
            "shared_bytes": one.shared_bytes,
            "num_warps": one.num_warps,
            **{name: len(re.findall(pattern, text[one.name, one.arch])) for name, pattern in INSTRUCTIONS.items()},
        }
        for one in compiled
    ]


def disassemble(compiled: Sequence[Compiled]) -> list[str]:
    """The SASS of each; all for the same card."""
    codes = [code(one) for one in compiled]
    listing = run("nvdisasm", b"".join(codes), "--binary", DISASSEMBLE_AS[compiled[0].arch])
    starts = [0, *itertools.accumulate(map(len, codes))]
    lines: list[list[str]] = [[] for _ in codes]
    for line in listing.splitlines():
        if found := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
            lines[bisect_right(starts, int(found[1], 16)) - 1].append(line)
    return ["\n".join(of_one) for of_one in lines]


def code(one: Compiled) -> bytes:
    """The kernel's instructions: what lies in the section .text.ENTRY of its cubin, a 64-bit ELF file."""
    (sections,) = struct.unpack_from("<Q", one.cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", one.cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", one.cubin, sections + i * size) for i in range(count)]
    wanted = f".text.{one.entry}\0".encode()
    for name, _, _, _, offset, length in headers:
        if one.cubin.startswith(wanted, headers[names][4] + name):
            return one.cubin[offset : offset + length]
    raise RuntimeError(f"{one.name}: its cubin has no code of {one.entry}")


def usage(cubin: bytes) -> dict[str, int]:
    told = run("cuobjdump", cubin, "--dump-resource-usage")
    found = {name: re.search(rf"{name}:(\d+)", told) for name in ("REG", "STACK", "LOCAL")}
    if missing := [name for name, value in found.items() if value is None]:
        raise RuntimeError(f"cuobjdump tells no {', '.join(missing)}: {told[:500]}")
    registers, stack, local = (int(value[1]) for value in found.values() if value)
    return {"registers": registers, "spills": stack + local}


def run(tool: str, content: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
