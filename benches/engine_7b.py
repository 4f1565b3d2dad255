"""The engine at LLaVA-7B's shapes with random weights: first token, decode, many requests, start-up.

    python -m benches.engine_7b --json engine.json            # on a GPU: llava-1.5-7b in bf16, int8, int4 and fp8
    python -m benches.engine_7b --preset tiny --device cpu    # the same script in a minute, for its own sake

Decode is held against the copy ceiling: the bytes that one step must read (weights, and keys and values of every
sequence) over its time, as a share of what a large copy reaches in the same run. Each measurement stands alone: one
that fails is reported with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llava_fast as lf
from benches.ceiling import copy_ceiling
from llava_fast.engine.config import EngineConfig
from llava_fast.model.quantized import quantize
from llava_fast.processor import Processor, Tokenizer

TOKENIZER = Path(lf.__file__).parent / "train" / "tiny" / "decoder"
WORDS = 64  # text tokens of a prompt, besides one picture
ANSWER = 128  # tokens of an answer


class Bench:
    """One model in one precision, with an engine made anew for each measurement."""

    def __init__(self, preset: str, device: torch.device, kind: str, answer: int):
        config = lf.ModelConfig.preset(preset)
        if config.image_token_id < 0:  # any id that random prompts do not hold
            config = config.replace(image_token_id=config.text.vocab_size - 1)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.kind, self.device, self.answer = kind, device, answer
        self.model = lf.Llava(config, device=device, dtype=dtype, seed=0).requires_grad_(False)
        if kind != "none":
            quantize(self.model, kind)
        self.processor = Processor.from_config(config, Tokenizer.load(TOKENIZER))

    def engine(self, *, background: bool = False, **config: Any) -> lf.Engine:
        return lf.Engine(self.model, self.processor, EngineConfig(**config), background=background)

    def request(self, seed: int, tokens: int, picture: bool = True, words: int = WORDS) -> lf.Request:
        rng = np.random.default_rng(seed)
        text = rng.integers(10, 600, words).tolist()
        images = [rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)] if picture else []
        ids = [1, *[self.processor.image_token_id] * len(images), *text]
        return lf.Request(token_ids=ids, images=images, sampling=lf.SamplingParams(max_tokens=tokens, ignore_eos=True))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def weight_bytes(self) -> int:
        """What a decode step reads of the model: the layers and the head, quantized or not."""
        modules = [self.model.decoder.layers, self.model.decoder.norm, self.model.lm_head]
        tensors = [t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())]
        return sum(t.numel() * t.element_size() for t in tensors)


def first_token(bench: Bench) -> dict[str, Any]:
    """One picture and 64 words, nothing cached; then another question on the picture."""
    with bench.engine(max_sequences=8) as engine:
        fresh, second = [], []
        for seed in range(8):
            engine.clear_caches()
            asked = bench.request(seed, tokens=1)
            fresh.append(timed(partial(engine.generate, [asked])))
            other = lf.Request(
                token_ids=[*asked.token_ids[:2], *bench.request(seed + 100, 1).token_ids[2:]],
                images=asked.images,
                sampling=asked.sampling,
            )
            second.append(timed(partial(engine.generate, [other])))
    return {"first_token_ms": 1e3 * statistics.median(fresh), "second_question_ms": 1e3 * statistics.median(second)}


def decode(bench: Bench, batch: int) -> dict[str, Any]:
    """Steps in which ``batch`` sequences, each with a picture, decode one token each."""
    steps = 8 if bench.device.type == "cpu" else 48
    with bench.engine(max_sequences=batch, max_step_tokens=max(2048, batch + 1)) as engine:
        handles = [engine.submit(bench.request(seed, tokens=steps + 40)) for seed in range(batch)]
        while engine.stats().first_tokens < batch:
            engine.step()
        for _ in range(4):
            engine.step()
        bench.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        bench.synchronize()
        seconds = (time.perf_counter() - start) / steps
        running, cache = engine._scheduler.running, engine._runner.cache
        held = sum(sequence.computed for sequence in running) * cache.block_bytes // cache.block_size
        assert len(running) == batch, f"{batch - len(running)} of {batch} sequences were not running"
        for handle in handles:
            handle.cancel()
    read = bench.weight_bytes() + held
    # A copy reads and writes: its bytes a second, both counted, are what reading alone is held against.
    share = read / seconds / copy_ceiling(bench.device)
    return {
        "batch": batch,
        "ms_per_step": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "gb_per_s": read / seconds / 1e9,
        "share_of_copy_ceiling": share,
    }


def at_once(bench: Bench, count: int) -> dict[str, Any]:
    """``count`` requests with a picture each, submitted together."""
    rng = random.Random(0)
    requests = [bench.request(seed, tokens=rng.randint(bench.answer // 8, bench.answer)) for seed in range(count)]
    with bench.engine(max_sequences=min(count, 256), max_queue=count) as engine:
        seconds = timed(lambda: engine.generate(requests))
        stats = engine.stats()
    tokens = sum(request.sampling.max_tokens for request in requests)
    return {"requests": count, "seconds": seconds, "tokens_per_s": tokens / seconds, "preemptions": stats.preemptions}


def poisson(bench: Bench, count: int, rate: float, limits: tuple[float, float]) -> dict[str, Any]:
    """``count`` requests arriving at random, ``rate`` a second on average.

    Goodput counts the requests whose first token came within limits[0] seconds and whose mean time between tokens
    stayed within limits[1].
    """
    rng = random.Random(1)
    first, between, good = [], [], 0
    with bench.engine(background=True, max_sequences=256, max_queue=count) as engine:
        start, due, handles = time.perf_counter(), 0.0, []
        for seed in range(count):
            due += rng.expovariate(rate)
            time.sleep(max(0.0, start + due - time.perf_counter()))
            handles.append(engine.submit(bench.request(seed, tokens=rng.randint(bench.answer // 8, bench.answer))))
        for handle in handles:
            done = handle.result()
            gap = (done.total_s - done.first_token_s) / max(1, len(done.token_ids) - 1)
            first.append(done.first_token_s)
            between.append(gap)
            good += done.first_token_s <= limits[0] and gap <= limits[1]
        seconds = time.perf_counter() - start
    return {
        "requests": count,
        "rate_per_s": rate,
        "goodput_per_s": good / seconds,
        "limits_s": limits,
        **{f"first_token_p{p}_ms": 1e3 * float(np.percentile(first, p)) for p in (50, 99)},
        **{f"between_tokens_p{p}_ms": 1e3 * float(np.percentile(between, p)) for p in (50, 99)},
    }


def startup(bench: Bench) -> dict[str, Any]:
    """An engine made twice in this process: the first may compile, the second finds everything compiled."""
    found = {}
    for name in ("cold", "warm"):
        start = time.perf_counter()
        with bench.engine() as engine:
            found[name] = {"seconds": time.perf_counter() - start, **engine.startup}
    return found


def transformers(bench: Bench, count: int) -> dict[str, Any]:
    """transformers' generate on the same weights: one prompt, then ``count`` in one padded batch."""
    import tempfile

    from transformers import LlavaForConditionalGeneration

    from llava_fast.checkpoint import save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(bench.model, Path(folder))
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=bench.model.dtype, attn_implementation="sdpa", device_map=None
        )
    model = model.to(bench.device).eval()
    image, rows = bench.processor.image_token_id, bench.processor.tokens_per_image

    @torch.inference_mode()
    def run(batch: int, tokens: int) -> float:
        requests = [bench.request(seed, tokens) for seed in range(batch)]
        ids = [[t for token in r.token_ids for t in ([image] * rows if token == image else [token])] for r in requests]
        pixels = bench.processor.image.stack([r.images[0] for r in requests]).to(bench.device, bench.model.dtype)
        inputs = torch.tensor(ids, device=bench.device)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        attended = torch.ones_like(inputs)
        work = lambda: model.generate(input_ids=inputs, attention_mask=attended, pixel_values=pixels, **options)  # noqa: E731
        work()
        bench.synchronize()
        return timed(lambda: (work(), bench.synchronize()))

    first, longer = run(1, 1), run(1, 33)
    seconds = run(count, bench.answer)
    lengths = random.Random(0)
    wanted = sum(lengths.randint(bench.answer // 8, bench.answer) for _ in range(count))
    return {
        "first_token_ms": 1e3 * first,
        "decode_ms": 1e3 * (longer - first) / 32,
        f"tokens_per_s_{count}": wanted / seconds,  # of the tokens asked for; the batch runs to its longest answer
    }


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llava-1.5-7b", help="sizes of the model (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--kinds", default="none,int8,int4,fp8", help="weight precisions (default %(default)s)")
    parser.add_argument("--batches", default="1,8,64,256", help="decode batches (default %(default)s)")
    parser.add_argument("--requests", default="64,256", help="numbers of requests at once (default %(default)s)")
    parser.add_argument("--rate", type=float, default=8.0, help="arrivals a second (default %(default)s)")
    parser.add_argument("--answer", type=int, default=ANSWER, help="longest answer in tokens (default %(default)s)")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    device = torch.device(args.device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "preset": args.preset,
        "copy_ceiling_gb_per_s": copy_ceiling(device) / 1e9,
    }
    failed = 0
    for kind in args.kinds.split(","):
        for name, found in measured(Bench(args.preset, device, kind, args.answer), args):
            failed += "error" in found
            results[f"{kind}/{name}"] = found
            print(f"{kind:5} {name:14}", json.dumps(found), flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


def measured(bench: Bench, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of each measurement of one model."""
    counts = [int(count) for count in args.requests.split(",")]
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "startup": partial(startup, bench),
        "first_token": partial(first_token, bench),
        **{f"decode_{batch}": partial(decode, bench, int(batch)) for batch in args.batches.split(",")},
        **{f"at_once_{count}": partial(at_once, bench, count) for count in counts},
        **{f"poisson_{count}": partial(poisson, bench, count, args.rate, (0.5, 0.05)) for count in counts},
    }
    if bench.kind == "none" and not args.no_transformers:
        work["transformers"] = partial(transformers, bench, counts[0])
    for name, measure in work.items():
        try:
            yield name, measure()
        except Exception as error:
            traceback.print_exc()
            yield name, {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
