"""Loading needs the model's memory and little more: measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llava_fast as lf
from llava_fast.checkpoint import save_model
from llava_fast.checkpoint.names import canonical_tensors
from llava_fast.config import TextConfig

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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_is_under_1_3_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the disk is not what is tested
    text = TextConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    config = lf.ModelConfig.preset("tiny").replace(text=text, projector="mlp2x_gelu")
    model = lf.Llava(config, seed=None, dtype=torch.bfloat16)
    mapped, pickled = tmp_path / "safetensors", tmp_path / "bin"
    save_model(model, mapped)
    pickled.mkdir()
    (pickled / "config.json").write_bytes((mapped / "config.json").read_bytes())
    torch.save(
        {name: tensor.clone() for name, tensor in canonical_tensors(model).items()}, pickled / "pytorch_model.bin"
    )
    del model
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
