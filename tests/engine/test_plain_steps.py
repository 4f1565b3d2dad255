"""Steps by numpy and the C library alone beside the steps that everything else takes."""

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


def answers(made: lf.Llava, told: list[bool], **budgets) -> list[list[int]]:
    """Answers one longer than the other; told: with log-probabilities, so that their steps are not plain."""
    rng, requests = np.random.default_rng(0), []
    for i, log in enumerate(told):
        wanted = 0 if log else None
        sampling = lf.SamplingParams(max_tokens=20 + 3 * i, ignore_eos=True, logprobs=wanted)
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


def test_none_without_the_library():
    made = model()
    processor = Processor.from_config(made.config, Tokenizer.load(TOKENIZER))
    with implementation("reference"), lf.Engine(made, processor, background=False) as engine:
        assert engine._runner.plain_steps is None


def test_none_where_tritons_kernels_are_asked_for():
    assert PlainSteps.fit([])
    with implementation("triton"):
        assert not PlainSteps.fit([])
