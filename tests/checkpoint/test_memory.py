"""Loading needs the model's memory and little more: measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llava_fast as lf
from llava_fast.checkpoint import save_model
from llava_fast.config import TextConfig
from llava_fast.model.quantized import KINDS

# Prints the peak resident memory while each directory is loaded, above what the process had before, and the weights'
# size, in bytes. Writing 5 to clear_refs sets the peak back to the present value.
MEASURE = """
import sys
from pathlib import Path
import torch
from llava_fast.checkpoint import load_model

def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

for directory in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    model = load_model(Path(directory))
    print((kilobytes("VmHWM") - before) * 1024, sum(p.nbytes for p in model.parameters()))
    del model
"""
# The same of a model that is quantized while it is read, of writing it, and of reading what was written; each peak also
# above what the process had before the first: what one leaves to the allocator the next takes up, which is no growth.
MEASURE_QUANTIZED = """
import os, sys
from pathlib import Path
import torch
from llava_fast.checkpoint import files, load_model, save_model

def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def measured(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    result = work()
    print(*((kilobytes("VmHWM") - earlier) * 1024 for earlier in (before, start)))
    return result

os.fsync, files.REMAP_BYTES = lambda file: None, 10 << 20
torch.set_num_threads(1)
plain, written, small, kind = sys.argv[1:]
load_model(Path(small), quantization=kind)  # what the first use takes for ever
start = kilobytes("VmRSS")
model = measured(lambda: load_model(Path(plain), quantization=kind))
print(sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
measured(lambda: save_model(model, Path(written)))
del model
model = measured(lambda: load_model(Path(written)))
"""
# glibc maps large weights at first; once it has seen some freed it keeps such in its heap, up to 20 MB. Held to mapping
# them, so that what is measured is what the program holds.
WEIGHTS_MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(512 << 10)}
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")


def write_model(directory: Path, layers: int) -> None:
    """bfloat16, 25 MB a layer and 20 MB beside them."""
    text = TextConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    config = lf.ModelConfig.preset("tiny").replace(text=text, projector="mlp2x_gelu")
    model = lf.Llava(config, seed=None, dtype=torch.bfloat16)
    for weight in model.parameters():
        weight.data.fill_(0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # the disk is not what is tested
        save_model(model, directory)


@linux
def test_peak_is_under_1_3_of_the_model(tmp_path: Path) -> None:
    mapped, pickled = tmp_path / "safetensors", tmp_path / "bin"
    write_model(mapped, 16)
    pickled.mkdir()
    (pickled / "config.json").write_bytes((mapped / "config.json").read_bytes())
    torch.save(load_file(mapped / "model.safetensors"), pickled / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(mapped), str(pickled)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        peak, size = map(int, line.split())
        print(f"peak {peak / size:.3f} of the model's {size} bytes")
        assert size > 400e6
        assert 1.0 < peak / size < 1.3  # below 1 the weights would not have been read


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model to measure, and a small one to warm up with."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "plain", 6)
    save_model(lf.Llava(lf.ModelConfig.preset("tiny"), seed=0), folder / "small")
    return folder


@linux
@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_takes_the_quantized_model_and_one_weight(models: Path, tmp_path: Path, kind: str) -> None:
    """And 10 MB of mapped pages, which the full model is far above. Writing takes one weight alone."""
    plain = models / "plain"
    paths = map(str, (plain, tmp_path / "written", models / "small"))
    command = [sys.executable, "-c", MEASURE_QUANTIZED, *paths, kind]
    environment = {**os.environ, **WEIGHTS_MAPPED}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    quantizing, held, size, saving, _, reading, held_again = map(int, done.stdout.split())
    print(f"{kind}: {size} bytes; quantizing {quantizing}, saving {saving}, reading {reading} of {held_again}")
    full = (plain / "model.safetensors").stat().st_size
    assert size < {"int8": 0.56, "fp8": 0.56, "int4": 0.36}[kind] * full
    for peak, total in ((quantizing, held), (reading, held_again)):
        assert 0.7 * size < total and peak < size + 25e6 < 0.8 * full
    assert saving < 25e6
