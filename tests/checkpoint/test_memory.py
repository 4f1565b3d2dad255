"""Loading needs the model's memory and little more: measured in a process of its own."""

from __future__ import annotations

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
def test_peak_is_under_1_3_of_the_model(tmp_path: Path) -> None:
    text = TextConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = lf.Llava(lf.ModelConfig.preset("tiny").replace(text=text, image_token_id=5), seed=None, dtype=torch.bfloat16)
    save_model(model, tmp_path / "safetensors")
    save_model(model, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(
        dict(canonical_tensors(model)) | second_layer(model), tmp_path / "bin" / "pytorch_model.bin"
    )
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "safetensors"), str(tmp_path / "bin")],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        peak, size = map(int, line.split())
        print(f"peak {peak / size:.3f} of the model's {size} bytes")
        assert size > 400e6
        assert 1.0 < peak / size < 1.3  # below 1 the weights would not have been read


def second_layer(model: lf.Llava) -> dict[str, torch.Tensor]:
    """What transformers' layout has and a linear projector has not."""
    dim = model.config.text.hidden_size
    prefix = "multi_modal_projector.linear_2."
    return {f"{prefix}weight": torch.eye(dim, dtype=model.dtype), f"{prefix}bias": torch.zeros(dim, dtype=model.dtype)}
