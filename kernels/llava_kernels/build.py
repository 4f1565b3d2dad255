"""Build: one Triton kernel with everything that compiling it ahead of time needs, and the compiling itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """What came out: the code and what a launch must know of it."""

    name: str
    arch: int
    kind: Kind
    shared_bytes: int  # a block
    num_warps: int
    entry: str  # name of the function in the cubin
    function: str  # name of the Triton function
    arguments: tuple[Argument, ...]  # in the cubin's order; two pointers to scratch memory follow them
    constants: dict[str, Any]
    scratch_bytes: int  # scratch memory that a launch has to bring
    cubin: bytes


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
    return Compiled(
        name=build.name,
        arch=arch,
        kind=build.kind,
        shared_bytes=kernel.metadata.shared,
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
