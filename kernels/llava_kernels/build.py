"""Build: one Triton kernel with everything that compiling it ahead of time needs, and the compiling itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHS = (80, 90)  # A100; H100 and H200
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that one block may use

Kind = Literal["gemm", "memory", "other"]


@dataclass(frozen=True, kw_only=True)
class Build:
    """A kernel at one of its production block sizes.

    Args:
        name: unique; names the cubin, such as "rms_norm_forward_bf16_4096".
        kernel: the ``@triton.jit`` function.
        signature: type of every argument that is not a constant, in order: "*bf16", "*fp32", "*i32", "i32", "fp32", ...
        constants: every ``tl.constexpr`` argument.
        num_warps, num_stages: of the launch.
        kind: what the compiled code must show: "gemm" tensor cores (wgmma on sm_90, mma with asynchronous copies on
            sm_80), "memory" 16-byte loads, "other" neither.
        not_aligned: names of arguments, integers and pointers, that may not be multiples of 16.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    kind: Kind = "other"
    not_aligned: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a launch: its type as in a Build's signature, and whether it must be a multiple of 16."""

    name: str
    type: str
    aligned: bool


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What came out: the code and what it takes of the card."""

    name: str
    arch: int
    kind: Kind
    registers: int  # a thread
    spills: int  # bytes of local memory a thread: stack and spilled registers
    shared_bytes: int  # a block
    instructions: dict[str, int]  # SASS counts: HGMMA, HMMA, LDGSTS (asynchronous copies), UTMALDG, LDG.128, STG.128
    num_warps: int
    entry: str  # name of the function in the cubin
    function: str  # name of the Triton function
    arguments: tuple[Argument, ...]  # in the cubin's order; two pointers to scratch memory follow them
    constants: dict[str, Any]
    scratch_bytes: int  # scratch memory that a launch has to bring
    cubin: bytes

    def row(self) -> dict[str, Any]:
        """The report's line: everything but the code."""
        return {
            "kernel": self.name,
            "arch": f"sm_{self.arch}",
            "kind": self.kind,
            "registers": self.registers,
            "spills": self.spills,
            "shared_bytes": self.shared_bytes,
            "num_warps": self.num_warps,
            **self.instructions,
        }


def compile_for(build: Build, arch: int) -> Compiled:
    """Compile with no GPU present. Integers and pointers are taken to be multiples of 16, as they are at launch."""
    names = list(build.kernel.arg_names)
    if missing := [n for n in names if n not in build.signature and n not in build.constants]:
        raise ValueError(f"{build.name}: no type or value is given for {', '.join(missing)}")
    signature = {n: build.signature.get(n, "constexpr") for n in names}
    aligned = [i for i, n in enumerate(names) if _divisible(signature[n]) and n not in build.not_aligned]
    source = ASTSource(
        fn=build.kernel,
        signature=signature,
        constexprs=dict(build.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassemble(kernel.asm["cubin"])
    return Compiled(
        name=build.name,
        arch=arch,
        kind=build.kind,
        registers=int(_one(r"REG:(\d+)", usage)),
        spills=int(_one(r"STACK:(\d+)", usage)) + int(_one(r"LOCAL:(\d+)", usage)),
        shared_bytes=kernel.metadata.shared,
        instructions={
            "HGMMA": len(re.findall(r"\bHGMMA\.", sass)),
            "HMMA": len(re.findall(r"\bHMMA\.", sass)),
            "LDGSTS": len(re.findall(r"\bLDGSTS\.", sass)),
            "UTMALDG": len(re.findall(r"\bUTMALDG\.", sass)),
            "LDG.128": len(re.findall(r"\bLDG\.\S*128\b", sass)),
            "STG.128": len(re.findall(r"\bSTG\.\S*128\b", sass)),
        },
        num_warps=kernel.metadata.num_warps,
        entry=kernel.metadata.name,
        function=build.kernel.fn.__name__,
        arguments=tuple(
            Argument(name=n, type=signature[n], aligned=i in aligned)
            for i, n in enumerate(names)
            if signature[n] != "constexpr"
        ),
        constants=dict(build.constants),
        scratch_bytes=kernel.metadata.global_scratch_size + kernel.metadata.profile_scratch_size,
        cubin=kernel.asm["cubin"],
    )


def _divisible(kind: str) -> bool:
    return kind.startswith("*") or kind in ("i32", "i64")


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no {pattern}: {text[:500]}")
    return found.group(1)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) by the cuobjdump that Triton's package carries."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        # nvdisasm itself: cuobjdump finds it on PATH only.
        sass = subprocess.run(
            [str(tools / "nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    return usage, sass
