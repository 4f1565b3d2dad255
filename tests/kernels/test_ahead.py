"""Triton's cache filled ahead of time: launchers that were never compiled find all they launch in it.

There is no GPU here. Triton is given a driver that answers as an H100's does and whose launches do nothing; from the
call of an op to the loading of the cubin, everything is Triton's own. The processes are others because in this one
kernels may be interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_kernels import aot

NOT_INTERPRETED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
CHEAP = "^_(rms_norm_forward|swiglu_forward|rope|rope_store_kv|store_kv|paged_combine)_kernel$"

LAUNCHES = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from llava_kernels import *
from llava_kernels.tiles import assume

launched, loaded = [], []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}
    def load_binary(self, name, cubin, shared, device):
        assert cubin.startswith(b"\\x7fELF")
        loaded.append(name)
        return "module", "function", 0, 0, 1024

class H100:
    utils = Utils()
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def launcher_cls(self, src, metadata):
        return lambda *arguments: launched.append(metadata.name)

def refuse(*_):
    raise RuntimeError("it compiles")

CUDABackend.add_stages = refuse

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)

def step(tokens, hidden, inner, heads):
    "One layer of an engine's step; sizes and places that the cache was not filled with."
    x, weight = empty(tokens, hidden), empty(hidden)
    rms_norm(x, weight, 1e-6), add_rms_norm(x, x, weight, 1e-6)
    swiglu(empty(tokens, 2 * inner))
    layers = empty(2, 20, 16, 2, heads, 128)
    keys, values = layers[1, :, :, 0], layers[1, :, :, 1]
    slots, angles = empty(tokens, dtype=torch.int64), empty(tokens, 64, dtype=torch.float32)
    qkv = empty(tokens, 3 * heads * 128).unflatten(1, (-1, 128))
    rope_store_kv(qkv, angles, angles, keys, values, slots, heads=heads)
    q, k = rope(qkv[:, : 2 * heads], angles, angles).split(heads, dim=1)
    store_kv(k, qkv[:, 2 * heads :], keys, values, slots)
    if sys.argv[1:] == ["attention"]:
        lens, starts = (empty(tokens + i, dtype=torch.int32) for i in (0, 1))
        table = empty(tokens, 77, dtype=torch.int32)
        paged_attention(q, keys, values, table, lens, starts, max_query=1, max_context=77 * 16)

driver.set_active(H100())
with assume(90), implementation("triton"), torch.inference_mode():
    for tokens in (1, 7, 300):
        step(tokens, 4096, 11008, 32)
        step(tokens, 5120, 13824, 40)
print(len(launched), *sorted(set(loaded)))
"""


def run(*command: str, cache: Path | None = None) -> subprocess.CompletedProcess:
    environment = NOT_INTERPRETED | ({} if cache is None else {"TRITON_CACHE_DIR": str(cache)})
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=1800)


def fill(folder: Path, only: str) -> subprocess.CompletedProcess:
    return run("-m", "llava_kernels.aot", "--cache", str(folder), "--arch", "90", "--only", only)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    done = fill(folder, CHEAP)
    assert done.returncode == 0, done.stderr
    assert "kernels for sm_90 are in" in done.stdout
    return folder


def test_launches_compile_nothing(filled):
    done = run("-c", LAUNCHES, cache=filled)
    assert done.returncode == 0, done.stderr
    launches, *kernels = done.stdout.split()
    assert int(launches) == 6 * 6
    names = ("rms_norm_forward", "rope", "rope_store_kv", "store_kv", "swiglu_forward")
    assert kernels == [f"_{name}_kernel" for name in names]


@pytest.mark.parametrize("case", ["nothing filled", "another kernel"])
def test_without_it_they_would_compile(case, filled, tmp_path):
    """That the test above can fail."""
    cache, arguments = (tmp_path, []) if case == "nothing filled" else (filled, ["attention"])
    done = run("-c", LAUNCHES, *arguments, cache=cache)
    assert done.returncode != 0
    assert "RuntimeError: it compiles" in done.stderr


def test_what_is_there_is_not_compiled_again(filled):
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*.cubin")}
    assert before
    assert fill(filled, CHEAP).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*.cubin")} == before


def test_a_name_that_no_kernel_has(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "fill", lambda *_: (0, []))
    assert aot.main(["--cache", str(tmp_path), "--only", "no_such_kernel"]) == 1
    assert capsys.readouterr().err == "error: no kernel's name matches 'no_such_kernel'\n"
