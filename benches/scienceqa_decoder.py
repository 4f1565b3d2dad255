"""Trains a small LLaMA decoder on ScienceQA's text, for benches/perplexity.py to take the perplexity of.

    python -m benches.scienceqa_decoder --problems problems.json OUT

Every problem is a sequence: question, context, options, lecture, solution and answer, all of it learned. The problems
of the official split "val" are left out. Unless a tokenizer is given, a vocabulary of 4,096 pieces is made from the
same problems, so that most of the work goes into the layers, which are what is rounded. No published checkpoint of a
LLaVA is small enough for a test machine, and a random model would tell nothing: its perplexity is that of the uniform
distribution whatever rounding does.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
import sentencepiece
import torch

import llava_fast as lf
from llava_fast.config import TextConfig, VisionConfig
from llava_fast.data.scienceqa import build_answer, build_question
from llava_fast.processor import Processor, Tokenizer

HELD_OUT = "val"
TOKENS = 512  # of a step
TEXT = TextConfig(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def texts(problems: Path, *, held_out: bool) -> list[str]:
    """The problems as text, those of the split "val" or all others.

    Raises:
        OSError, ValueError: no such file, or not JSON.
    """
    table = json.loads(problems.read_bytes())
    return [
        f"{build_question(problem, 'QCM')}\n{build_answer(problem, 'LEPA')}"
        for problem in table.values()
        if (problem["split"] == HELD_OUT) == held_out
    ]


def make_tokenizer(problems: list[str], path: Path, size: int = 4096) -> Tokenizer:
    """Byte-pair pieces of the problems, with every byte besides, written to ``path``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(problems),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 17,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer.load(path)


def encoded(text: str, tokenizer: Tokenizer, length: int) -> list[int]:
    """A sequence as the model learns it: begin, text, end; no more than ``length`` ids."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*begin, *tokenizer.encode(text, prefix=True)[0], tokenizer.eos_id][:length]


def steps(sequences: list[list[int]], seed: int) -> Iterator[list[list[int]]]:
    """One pass in random order, about TOKENS tokens at a time."""
    order = Random(seed).sample(sequences, len(sequences))
    batch: list[list[int]] = []
    for sequence in order:
        if batch and sum(map(len, batch)) + len(sequence) > TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    yield batch


def packed(sequences: list[list[int]], model: lf.Llava) -> lf.PackedBatch:
    """All tokens supervised but each sequence's last position, which has no successor."""
    lengths = [len(s) for s in sequences]
    return lf.PackedBatch(
        input_ids=torch.tensor([i for s in sequences for i in s]),
        labels=torch.tensor([i for s in sequences for i in [*s[1:], -100]]),
        position_ids=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        pixel_values=torch.empty(0, 3, model.config.vision.image_size, model.config.vision.image_size),
        image_token_id=model.config.image_token_id,
    )


def train(
    model: lf.Llava,
    sequences: list[list[int]],
    seconds: float,
    rate: float,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """AdamW for so long: a tenth of it warm-up, then cosine decay. Vision tower and projector are not touched."""
    model.requires_grad_(False)
    parts = list(model.decoder.parameters())
    for part in parts:
        part.requires_grad_(True)
    optimizer = torch.optim.AdamW(parts, lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    batches = (batch for epoch in count() for batch in steps(sequences, seed=epoch))
    started, shown, done, smoothed = clock(), 0.0, 0, math.log(model.config.text.vocab_size)
    while (past := clock() - started) < seconds:
        batch, share = next(batches), past / seconds
        for group in optimizer.param_groups:
            group["lr"] = rate * min(10 * share, 0.5 + 0.5 * math.cos(math.pi * share))
        loss = model.loss(packed(batch, model))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()
        done += sum(map(len, batch))
        smoothed += 0.02 * (loss.item() - smoothed)
        if past - shown > 20:
            shown = past
            print(f"{past:.0f} s  {done:,} tokens, {done / past:,.0f} a second  loss {smoothed:.3f}", flush=True)
    print(f"{done:,} tokens  loss {smoothed:.3f}")


def make(tokenizer: Tokenizer, text: TextConfig = TEXT) -> tuple[lf.Llava, Processor]:
    """A decoder with fresh weights under the smallest of vision towers."""
    text = replace(
        text, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id or 0, eos_token_id=tokenizer.eos_id
    )
    vision = VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=28
    )
    config = lf.ModelConfig(vision=vision, text=text)
    return lf.Llava(config, seed=0), Processor.from_config(config, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the model is written, in transformers' format")
    parser.add_argument("--problems", type=Path, required=True, help="ScienceQA's problems.json")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model, tokenizer.json or their folder; default: made")
    parser.add_argument("--minutes", type=float, default=40, help="how long to train (default %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate (default %(default)s)")
    args = parser.parse_args()
    problems = texts(args.problems, held_out=False)
    args.out.mkdir(parents=True, exist_ok=True)
    made = args.out / "tokenizer.model"
    tokenizer = make_tokenizer(problems, made) if args.tokenizer is None else Tokenizer.load(args.tokenizer)
    model, processor = make(tokenizer)
    length = model.config.text.max_position_embeddings
    sequences = [encoded(text, tokenizer, length) for text in problems]
    print(f"{len(sequences)} problems, {sum(map(len, sequences)):,} tokens")
    train(model, sequences, 60 * args.minutes, args.rate)
    lf.save(model.bfloat16(), processor, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
