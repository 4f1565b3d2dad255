"""The ways in which a step can attend and multiply: all give the same tokens as the plain model."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch

import llava_fast as lf
import llava_kernels
from llava_fast.checkpoint import load_model
from llava_fast.engine import host_decoder
from tests import transformers_llava as hf
from tests.engine.conftest import Pair, picture, prompt

linear = importlib.import_module("llava_kernels.linear")


def mixed_requests(count: int = 12, longest: int = 40, tokens: int = 6) -> list[lf.Request]:
    rng = np.random.default_rng(5)
    made = []
    for number in range(count):
        images = [picture(rng)] * (number % 2)
        ids = prompt(rng, int(rng.integers(1, longest)), len(images))
        made.append(lf.Request(token_ids=ids, images=images, sampling=lf.SamplingParams(max_tokens=tokens, logprobs=0)))
    return made


def answers(pair: Pair, requests: list[lf.Request], **config) -> list[list[int]]:
    with pair.engine(**config) as engine:
        completions = engine.generate(requests)
    assert not any(c.error for c in completions)
    return [c.token_ids for c in completions]


@pytest.mark.parametrize("gathered", [0, 1 << 30], ids=["one by one", "padded together"])
@pytest.mark.parametrize("compiled", [True, False], ids=["TorchScript", "plain Python"])
def test_the_flat_decoder(pair, monkeypatch, gathered, compiled):
    monkeypatch.setattr(host_decoder, "GATHER_BYTES", gathered)
    if not compiled:
        plain = host_decoder.decode, host_decoder.normalize_and_multiply
        monkeypatch.setattr(host_decoder, "compiled", lambda: plain)
    requests = mixed_requests()
    assert answers(pair, requests, max_step_tokens=64, block_size=8) == [pair.reference(r) for r in requests]


def test_torchscript_takes_the_flat_decoder():
    """On the releases that this project supports it does; without it, tiny models decode at half the speed."""
    assert all(isinstance(function, torch.jit.ScriptFunction) for function in host_decoder.compiled())


@pytest.mark.parametrize(
    "config", [{}, {"lookahead": 1, "max_step_tokens": 20, "max_sequences": 8}], ids=["", "chunks"]
)
def test_the_kernels(tmp_path, pair, config):
    """The path of a GPU with Triton's interpreter: fused store, paged and packed attention, the fused splice."""
    theirs = hf.make(kv_heads=2, vocab=420, layers=1, seed=4)
    theirs.save_pretrained(tmp_path)
    small = Pair(theirs, load_model(tmp_path).requires_grad_(False), pair.processor)
    requests = mixed_requests(count=4, longest=12, tokens=3)
    with llava_kernels.implementation("triton"):
        assert answers(small, requests, **config) == [small.reference(r) for r in requests]


def test_references_of_the_kernels(pair, monkeypatch):
    """The same path on the references, as quantized models take it on a CPU."""
    monkeypatch.setattr(host_decoder.HostDecoder, "fits", lambda model: False)
    requests = mixed_requests()
    assert answers(pair, requests, max_step_tokens=64, block_size=8) == [pair.reference(r) for r in requests]


def test_a_float8_cache_changes_little(pair):
    """The first token's log-probability moves, by no more than eight bits explain; half the bytes hold as much."""
    requests = mixed_requests(tokens=1)
    with pair.engine() as engine:
        exact = [c.outputs[0].logprobs[0] for c in engine.generate(requests)]
    with pair.engine(kv_cache_dtype="fp8") as engine:
        rounded = [c.outputs[0].logprobs[0] for c in engine.generate(requests)]
        assert engine.stats().blocks == 4 * (1 << 22) // engine._runner.cache.block_bytes // 4
    same = [(a, b) for a, b in zip(exact, rounded, strict=True) if a.token_id == b.token_id]
    moved = [abs(a.logprob - b.logprob) for a, b in same]
    assert len(same) >= 8 and 0 < np.mean(moved) < 0.1


def test_sixteen_bits_on_a_cpu_without_them(pair, monkeypatch):
    """Products and cache in float32 under a bfloat16 model: as near to float32 as torch's own 16-bit products."""
    monkeypatch.setenv("LLAVA_KERNELS", "reference")  # without the C library
    requests = mixed_requests(tokens=1)
    half = dataclasses.replace(pair, model=load_copy(pair.model).to(torch.bfloat16))
    exact = first_logprobs(pair, requests)
    moved = {}
    for has in (True, False):
        monkeypatch.setattr(linear, "_has_half_products", lambda has=has: has)
        with half.engine() as engine:
            assert engine._runner.cache.memory.dtype == (torch.bfloat16 if has else torch.float32)
        moved[has] = np.mean(np.abs(first_logprobs(half, requests) - exact))
    assert 0 < moved[False] < 1.1 * moved[True]


def load_copy(model: lf.Llava) -> lf.Llava:
    copy = lf.Llava(model.config, seed=None)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


def first_logprobs(pair: Pair, requests: list[lf.Request]) -> np.ndarray:
    """Log-probability of token 7 as the first of each answer."""
    forced = [
        dataclasses.replace(r, sampling=lf.SamplingParams(max_tokens=1, logprobs=0, logit_bias={7: 1e4}))
        for r in requests
    ]
    with pair.engine() as engine:
        return np.array([c.outputs[0].logprobs[0].logprob for c in engine.generate(forced)])


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_quantized_model(pair, kind):
    """Greedy answers of the plain loop over the same quantized weights."""
    from llava_fast.model.quantized import quantize

    model = load_copy(pair.model)
    quantize(model, kind)
    quantized = dataclasses.replace(pair, model=model)
    requests = mixed_requests(count=5)
    encoded = [pair.processor.prompt_of_ids(r.token_ids, list(r.images)) for r in requests]
    expected = [model.generate(pair.processor.collate([e]), max_new_tokens=6, stop_ids=())[0] for e in encoded]
    ignoring = [dataclasses.replace(r, sampling=lf.SamplingParams(max_tokens=6, ignore_eos=True)) for r in requests]
    assert answers(quantized, ignoring) == expected
