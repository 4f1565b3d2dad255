"""A LLaVA-1.5-7B-shaped model in int4 on a CPU: memory, load time, first token, tokens per second.

    python -m benches.cpu_7b --folder /scratch --json cpu_7b.json     # 20 GB of disk, removed afterwards
    python -m benches.cpu_7b --preset tiny --folder /scratch          # the same in seconds

Random weights are written as transformers writes a checkpoint, bf16 in shards, then come four processes: one loads it
with quantization="int4", one does so and saves the result, one loads what was saved, one answers with that: a picture
(576 rows at 7B) and a short question. Each tells its peak resident memory, from Linux's VmHWM: everything
counts in it, the mapped pages of weight files too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llava_fast as lf
from llava_fast.checkpoint.files import SHARD_BYTES, Made, form_of, write_json, write_tensors
from llava_fast.checkpoint.huggingface import config_fields
from llava_fast.checkpoint.names import stored_tensors
from llava_fast.checkpoint.packed import quantization_fields
from llava_fast.engine.native_decoder import NativeDecoder
from llava_fast.model.quantized import QuantizedLinear, put_empty, quantized_layers
from llava_fast.processor import Processor, Tokenizer

TOKENIZER = Path(lf.__file__).parent / "train" / "tiny" / "decoder"
KIND = "int4"
WORDS = 16  # text tokens of the question


def write_checkpoint(preset: str, folder: Path, shard_bytes: int = SHARD_BYTES, kind: str | None = None) -> int:
    """Random weights in bf16, or as if rounded to ``kind``, made a tensor at a time while they are written; returns
    their bytes."""
    config = lf.ModelConfig.preset(preset).replace(dtype="bfloat16", projector="mlp2x_gelu")
    tokenizer = Tokenizer.load(TOKENIZER)
    config = config.replace(image_token_id=tokenizer.token_id("<image>"))
    model = lf.Llava(config, device="meta", dtype=torch.bfloat16, seed=None)
    if kind is not None:
        for name in quantized_layers(model, kind):
            put_empty(model, kind, name)
    stored = stored_tensors(model)
    forms = {name: form_of(one.tensor) for name, one in stored.items()}
    more = 8 * 997 * len(forms)  # each tensor is a stretch of the same noise that begins elsewhere
    noise = torch.empty(max(t.numel() for t in forms.values()) + more, dtype=torch.bfloat16).normal_(0.0, 0.02)

    def random(name: str, like: Tensor, at: int) -> Tensor:
        if name.endswith("weight_shape"):
            return form_of(stored[name].tensor)
        if like.dim() == 1 or name.endswith("weight_channel"):  # norms and biases
            return torch.ones(like.shape, dtype=like.dtype)
        some = noise[8 * 997 * at :][: like.numel()].view(like.shape)
        if name.endswith("weight_scale"):  # 16 levels over the range of such noise
            return some.mul(0).add_(0.08 / 15).to(like.dtype)
        if name.endswith("weight_offset"):
            return some.mul(0).sub_(0.04).to(like.dtype)
        return some.to(like.dtype) if like.is_floating_point() else (some * 1e11).to(like.dtype)  # any bits are codes

    tensors = {name: Made(like, partial(random, name, like, at)) for at, (name, like) in enumerate(forms.items())}
    write_tensors(folder, tensors, shard_bytes=shard_bytes)
    fields = config_fields(config)
    if kind is not None:
        fields["quantization_config"] = quantization_fields(kind, head=isinstance(model.lm_head, QuantizedLinear))
    write_json(folder / "config.json", fields)
    Processor.from_config(config, tokenizer).save(folder)
    return sum(form_of(t).nbytes for t in tensors.values())


def load(folder: Path, quantization: str | None) -> tuple[lf.Llava, Processor, dict[str, Any]]:
    start = time.perf_counter()
    model, processor = lf.load(folder, quantization=quantization)
    seconds = time.perf_counter() - start
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return model, processor, {"load_s": seconds, "model_bytes": held}


def round_it(folder: Path, tokens: int) -> dict[str, Any]:
    """Load and round the bf16 checkpoint."""
    return load(folder, KIND)[2]


def save_it(folder: Path, tokens: int) -> dict[str, Any]:
    """Load and round it, and save the result beside it."""
    model, processor, found = load(folder, KIND)
    start = time.perf_counter()
    lf.save(model, processor, folder / KIND)
    written = sum(file.stat().st_size for file in (folder / KIND).iterdir())
    return found | {"save_s": time.perf_counter() - start, "saved_bytes": written}


def load_saved(folder: Path, tokens: int) -> dict[str, Any]:
    """Load what was saved."""
    return load(folder / KIND, None)[2]


def answer(folder: Path, tokens: int) -> dict[str, Any]:
    """Load what was saved and answer ``tokens`` tokens about a picture."""
    model, processor, found = load(folder / KIND, None)
    rng = np.random.default_rng(0)
    side = model.config.vision.image_size
    request = lf.Request(
        token_ids=[1, processor.image_token_id, *rng.integers(10, 600, WORDS).tolist()],
        images=[rng.integers(0, 256, (side, side, 3), dtype=np.uint8)],
        sampling=lf.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
    )
    start = time.perf_counter()
    with lf.Engine(model, processor, lf.EngineConfig(max_sequences=4), background=False) as engine:
        ready = time.perf_counter() - start
        native = engine._runner.host_decoder
        done = engine.generate([request])[0]
        cache = engine._runner.cache.num_bytes
    if done.error is not None:
        raise done.error
    assert done.first_token_s is not None and done.total_s is not None
    assert len(done.outputs[0].token_ids) == tokens
    return found | {
        "start_s": ready,  # the engine's, with its warm-up
        "prompt_tokens": done.prompt_tokens,
        "first_token_s": done.first_token_s,
        "tokens_per_s": (tokens - 1) / (done.total_s - done.first_token_s),
        "kv_cache_bytes": cache,
        "decoder": f"C library, {native.instructions}, {native.threads} threads"
        if isinstance(native, NativeDecoder)
        else "torch",
    }


STAGES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "round": round_it,
    "save": save_it,
    "load": load_saved,
    "answer": answer,
}


def peak_bytes() -> int:
    """Most memory that was ever resident in this process: anonymous and of mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def in_a_process(stage: str, folder: Path, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benches.cpu_7b", "--stage", stage, "--folder", str(folder)]
    done = subprocess.run([*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(preset: str, folder: Path, tokens: int, stages: Iterable[str] = STAGES) -> dict[str, Any]:
    """The stages, each in a process, in a folder of its own inside ``folder`` that is removed afterwards."""
    own = Path(tempfile.mkdtemp(prefix="cpu_7b.", dir=folder))
    try:
        found: dict[str, Any] = {"preset": preset, "checkpoint_bytes": write_checkpoint(preset, own)}
        print(f"wrote {found['checkpoint_bytes'] / 1e9:.2f} GB", flush=True)
        for stage in stages:
            found[stage] = in_a_process(stage, own, tokens)
            print(f"{stage:7}", json.dumps(found[stage]), flush=True)
        return found
    finally:
        shutil.rmtree(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llava-1.5-7b", help="sizes of the model (default %(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="where there is disk: 20 GB at 7B")
    parser.add_argument("--tokens", type=int, default=33, help="of the answer (default %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--write", choices=("bf16", KIND), help="only write that checkpoint into --folder")
    parser.add_argument("--stage", choices=STAGES, help="only this, on the checkpoint in --folder")
    args = parser.parse_args()
    if args.write:
        saved = args.write == KIND
        print(write_checkpoint(args.preset, args.folder / KIND if saved else args.folder, kind=KIND if saved else None))
    elif args.stage:
        result = STAGES[args.stage](args.folder, args.tokens)
        print(json.dumps(result | {"peak_bytes": peak_bytes(), "threads": torch.get_num_threads()}))
    else:
        results = measure(args.preset, args.folder, args.tokens)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
