"""benches/cpu_7b.py from end to end with a small model: written, rounded, saved, loaded, asked."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import llava_fast as lf
from benches import cpu_7b
from llava_fast.checkpoint.files import weight_files


def test_end_to_end(tmp_path: Path):
    stages = ("save", "answer")  # the others are parts of these
    found = cpu_7b.measure("tiny", tmp_path, tokens=4, stages=stages)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    held = {stage: found[stage]["model_bytes"] for stage in stages}
    assert len(set(held.values())) == 1 and held["save"] < 0.8 * found["checkpoint_bytes"]
    assert found["answer"]["prompt_tokens"] == 9 + 1 + cpu_7b.WORDS and found["answer"]["first_token_s"] > 0
    assert all(found[stage]["peak_bytes"] > held[stage] for stage in stages)
    json.dumps(found)


def test_what_is_saved_is_what_was_rounded(tmp_path: Path):
    """From several shards; each tensor has weights of its own."""
    written = cpu_7b.write_checkpoint("tiny", tmp_path, shard_bytes=1 << 20)
    assert len(weight_files(tmp_path)) > 2 and written == sum(
        entry.nbytes for entry in lf.checkpoint.files.TensorFiles.find(tmp_path).entries.values()
    )
    cpu_7b.save_it(tmp_path, 0)
    rounded, _, _ = cpu_7b.load(tmp_path, cpu_7b.KIND)
    saved, _, _ = cpu_7b.load(tmp_path / cpu_7b.KIND, None)
    other = dict(saved.state_dict())
    assert all(torch.equal(tensor, other[name]) for name, tensor in rounded.state_dict().items())
    first, second = (rounded.decoder.layers[i].out.dequantize() for i in (0, 1))
    assert not torch.equal(first, second)
