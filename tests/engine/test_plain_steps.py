"""Steps by one call of the C library beside the steps that everything else takes."""

import numpy as np
import pytest
import torch

import llava_fast as lf
from llava_fast.engine.plain_steps import PlainSteps
from llava_fast.processor import Processor, Tokenizer
from llava_kernels import implementation, library
from tests.engine.test_native_decoder import TOKENIZER, model

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many sequences each plain step had; those of nobody, before the first request, are not counted."""
    steps, run = [], PlainSteps.__call__

    def count(self, chunks):
        if chunks[0].sequence.job is not None:
            steps.append(len(chunks))
        return run(self, chunks)

    monkeypatch.setattr(PlainSteps, "__call__", count)
    return steps


DRAWN = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
]


def answers(made: lf.Llava, told: list[bool], drawn: list[dict] | None = None, **budgets) -> list[list[int]]:
    """Answers one longer than the other. told: with log-probabilities, so that no step is plain; drawn: how."""
    rng, requests = np.random.default_rng(0), []
    for i, log in enumerate(told):
        wanted = 0 if log else None
        how = {} if drawn is None else drawn[i] | {"seed": i}
        sampling = lf.SamplingParams(max_tokens=20 + 3 * i, ignore_eos=True, logprobs=wanted, **how)
        words = [1, *rng.integers(10, 600, int(rng.integers(1, 60))).tolist()]
        requests.append(lf.Request(token_ids=words, sampling=sampling))
    processor = Processor.from_config(made.config, Tokenizer.load(TOKENIZER))
    config = lf.EngineConfig(**{"kv_cache_bytes": 1 << 20, "max_sequences": 8, **budgets})
    with lf.Engine(made, processor, config, background=False) as engine:
        return [completion.token_ids for completion in engine.generate(requests)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budgets", [{}, {"kv_cache_bytes": 1 << 18}])  # in the second they take blocks from each other
def test_the_same_tokens_whatever_is_told_about_them(counted, dtype, budgets):
    made, count = model(dtype), 6
    plain = answers(made, [False] * count, **budgets)
    assert max(counted) > 1
    counted.clear()
    assert answers(made, [True] * count, **budgets) == plain
    assert not counted
    assert answers(made, [True, False] * (count // 2), **budgets) == plain  # plain once the last of the told has ended
    assert counted


def test_drawn_tokens_are_those_that_the_reference_draws(counted):
    """Each by its own settings and seed, the likeliest among them, in steps of up to seven."""
    made, count = model(), len(DRAWN)
    plain = answers(made, [False] * count, DRAWN)
    assert max(counted) > 1
    counted.clear()
    assert answers(made, [True] * count, DRAWN) == plain
    assert not counted
    with implementation("reference"):
        assert answers(made, [False] * count, DRAWN) == plain
    assert not counted and len(set(map(tuple, plain))) == count


def test_none_without_the_library():
    made = model()
    processor = Processor.from_config(made.config, Tokenizer.load(TOKENIZER))
    with implementation("reference"), lf.Engine(made, processor, background=False) as engine:
        assert engine._runner.plain_steps is None


def test_none_where_tritons_kernels_are_asked_for():
    assert PlainSteps.fit([])
    with implementation("triton"):
        assert not PlainSteps.fit([])
