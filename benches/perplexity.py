"""What rounding the weights costs: perplexity of held-out text in bf16, int8 and int4, through the engine.

    python -m benches.perplexity                                       # the built-in model on scenes it has not seen
    python -m benches.perplexity MODEL --problems problems.json        # a LLaVA directory on ScienceQA's split "val"

The model should know such text: benches/scienceqa_decoder.py trains a small one on ScienceQA's other problems. What is
measured is what serves: prompt_logprobs of the engine, on a CPU with the C library's products.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llava_fast as lf
from benches.scienceqa_decoder import encoded, texts
from llava_fast.config import IGNORE
from llava_fast.data.scenes import Scenes
from llava_fast.engine.native_decoder import NativeDecoder
from llava_fast.pretrained import built_in
from llava_kernels import implementation

# name: (dtype, quantization, implementation, the engine's settings); the first is what the others are held against.
KINDS: dict[str, tuple[torch.dtype, str | None, str, dict[str, int]]] = {
    "bf16": (torch.bfloat16, None, "auto", {}),
    "int8": (torch.bfloat16, "int8", "auto", {}),  # activations of 8 bits where the library has such products
    "int4": (torch.bfloat16, "int4", "auto", {}),
    "int4-few": (torch.bfloat16, "int4", "auto", {"max_sequences": 1, "max_step_tokens": 4}),  # products as in decoding
    "int8-16": (torch.bfloat16, "int8", "auto", {"activation_bits": 16}),
    "int4-16": (torch.bfloat16, "int4", "auto", {"activation_bits": 16}),
    "bf16-torch": (torch.bfloat16, None, "reference", {}),
    "fp32-torch": (torch.float32, None, "reference", {}),
}
BOUNDS = {"int8": 1.01, "int4": 1.05, "int4-few": 1.05}  # of bf16's perplexity


@dataclass(frozen=True)
class Passage:
    """A prompt, and which of its tokens count; image rows are one token in ``token_ids`` and many in ``scored``."""

    token_ids: list[int]
    images: list[Any]
    scored: np.ndarray  # (n,) positions in the expanded prompt


def scienceqa(processor: lf.Processor, problems: Path, limit: int | None = None) -> list[Passage]:
    """Held-out problems, every token but the first."""
    passages = []
    for text in texts(problems, held_out=True)[:limit]:
        ids = encoded(text, processor.tokenizer, processor.max_length - 1)
        passages.append(Passage(ids, [], np.arange(1, len(ids))))
    return passages


def scenes(processor: lf.Processor, count: int, seed: int = 77_777) -> list[Passage]:
    """Conversations, descriptions and reasoning about unseen scenes: the assistant's tokens."""
    made = Scenes(count, seed)
    return [answers_of(processor, made[i]) for i in range(len(made))]


def answers_of(processor: lf.Processor, sample: dict[str, Any]) -> Passage:
    expanded = processor.encode(sample)
    image = expanded.input_ids == processor.image_token_id
    first_rows = image & ((np.cumsum(image) - 1) % processor.tokens_per_image == 0)
    return Passage(
        expanded.input_ids[~image | first_rows].tolist(), expanded.images, np.flatnonzero(expanded.labels != IGNORE) + 1
    )


def perplexity(engine: lf.Engine, passages: Iterable[Passage]) -> tuple[float, int]:
    """exp of the mean of -log p over the scored tokens, and how many these are."""
    passages = list(passages)
    sampling = lf.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    asked = [lf.Request(token_ids=p.token_ids, images=p.images, sampling=sampling) for p in passages]
    total, count = 0.0, 0
    for passage, completion in zip(passages, engine.generate(asked), strict=True):
        if completion.error is not None:
            raise completion.error
        assert completion.prompt_logprobs is not None
        for place in passage.scored:
            score = completion.prompt_logprobs[place]
            assert score is not None
            total -= score.logprob
            count += 1
    return math.exp(total / count), count


def measure(directory: Path, passages_of: Any, kinds: Iterable[str] = KINDS) -> dict[str, Any]:
    """By kind: perplexity, its share of the first kind's, the decoder's bytes, and what multiplied.

    Args:
        directory: the model, in whatever precision.
        passages_of: from its processor, the passages.
        kinds: of :data:`KINDS`.
    """
    found: dict[str, Any] = {}
    for kind in kinds:
        dtype, quantization, choice, settings = KINDS[kind]
        with ExitStack() as stack:
            stack.enter_context(implementation(choice))
            model, processor = lf.load(directory, dtype=dtype, quantization=quantization)
            passages = passages_of(processor)
            engine = stack.enter_context(lf.Engine(model, processor, lf.EngineConfig(**settings), background=False))
            native = engine._runner.host_decoder
            value, tokens = perplexity(engine, passages)
        layers = model.decoder.layers
        found[kind] = {
            "perplexity": value,
            "tokens": tokens,
            "layer_bytes": sum(t.nbytes for t in (*layers.parameters(), *layers.buffers())),
            "products": f"C library, {native.instructions}" if isinstance(native, NativeDecoder) else "torch",
        }
        found[kind]["of_first"] = value / found[next(iter(found))]["perplexity"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="LLaVA directory; default the built-in model")
    parser.add_argument("--problems", type=Path, help="ScienceQA's problems.json; default: built-in scenes")
    parser.add_argument("--limit", type=int, help="only so many problems or scenes (default all problems, 300 scenes)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default %(default)s; the first is the measure")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()

    def passages_of(processor: lf.Processor) -> list[Passage]:
        if args.problems:
            return scienceqa(processor, args.problems, args.limit)
        return scenes(processor, args.limit or 300)

    found = measure(args.model or built_in(), passages_of, args.kinds.split(","))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'weights':12} {'perplexity':>10} {'of first':>8} {'layers, MB':>10} {'tokens':>8}  products")
    for kind, row in found.items():
        size = row["layer_bytes"] / 1e6
        print(
            f"{kind:12} {row['perplexity']:10.4f} {row['of_first']:8.4f} {size:10.2f} {row['tokens']:8}  "
            f"{row['products']}"
        )
    over = [k for k, bound in BOUNDS.items() if k in found and found[k]["of_first"] > bound]
    print(f"above its bound: {', '.join(over)}" if over else "int8 within 1%, int4 within 5%")
    return int(bool(over))


if __name__ == "__main__":
    raise SystemExit(main())
