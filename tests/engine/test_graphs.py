"""CUDA graphs. On a CPU only what the host works out for them; the rest skips itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llava_fast as lf
from llava_fast.engine.graphs import DecodeGraphs, buckets
from llava_fast.engine.inputs import StepInputs
from llava_fast.engine.transfer import layout
from tests.engine.conftest import picture, prompt

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_buckets():
    assert buckets(1) == [1]
    assert buckets(2) == [1, 2]
    assert buckets(20) == [1, 2, 4, 8, 16, 20]
    for most in range(1, 70):
        assert buckets(most)[-1] == most and buckets(most) == sorted(set(buckets(most)))


@pytest.fixture
def graphs(pair, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    with pair.engine(max_sequences=8, block_size=8) as engine:
        runner = engine._runner
        yield DecodeGraphs(pair.model, runner.cache, runner.sampler, None, max_length=512, max_sequences=8)


def step_inputs(count: int) -> StepInputs:
    arrays = {
        "rows": np.arange(count, dtype=np.int64),
        "slots": 100 + np.arange(count, dtype=np.int64),
        "position_ids": 50 + np.arange(count, dtype=np.int32),
        "context_lens": 51 + np.arange(count, dtype=np.int32),
        "block_table": np.arange(count * 7, dtype=np.int32).reshape(count, 7),
    }
    return StepInputs([None] * count, count, arrays, [], 1, 60, True)


def test_padding(graphs):
    """What fills a batch up stores nothing, sees nothing and draws into the spare row."""
    filled, empty = graphs.padded(step_inputs(3), 4), graphs.padded(None, 4)
    assert layout(filled) == layout(empty)  # a recording reads every step's inputs from the same places
    for name, given in step_inputs(3).arrays.items():
        found = filled[name][:3, : given.shape[1]] if given.ndim > 1 else filled[name][:3]
        assert (found == given).all()
    assert filled["rows"][3] == 8 and filled["slots"][3] == -1 and filled["context_lens"][3] == 0
    assert filled["query_start"].tolist() == [0, 1, 2, 3, 4]


def test_padding_does_not_change_logits(graphs, pair):
    """The recorded function, run as it is: rows of a padded batch are those of the batch alone."""
    engine_inputs = step_inputs(3)
    engine_inputs.arrays["slots"] = np.array([56, 120, 200])
    engine_inputs.arrays["block_table"] = np.array([[7], [15], [25]], dtype=np.int32)
    engine_inputs.arrays["context_lens"] = np.array([1, 1, 1], dtype=np.int32)
    engine_inputs.arrays["position_ids"] = np.array([0, 0, 0], dtype=np.int32)
    with torch.inference_mode():
        graphs._sampler.last[:3] = torch.tensor([5, 6, 7])
        sent = {name: torch.from_numpy(array) for name, array in graphs.padded(engine_inputs, 8).items()}
        padded = graphs._step(sent)
        batch = lf.PackedBatch(
            torch.tensor([5, 6, 7]), torch.full((3,), -100), torch.zeros(3, dtype=torch.int32),
            torch.arange(4, dtype=torch.int32), torch.zeros(0, 3, 28, 28), 4,
        )  # fmt: skip
        torch.testing.assert_close(padded[:3], pair.model.logits(batch), atol=1e-4, rtol=0)
        assert padded[3:].isfinite().all()


@needs_gpu
def test_graphs_change_no_token(pair):
    model = lf.Llava(pair.model.config, device="cuda", seed=None).requires_grad_(False)
    model.load_state_dict(pair.model.state_dict())
    rng = np.random.default_rng(0)
    sampling = lf.SamplingParams(max_tokens=12)
    requests = [
        lf.Request(token_ids=prompt(rng, 10 + i, i % 2), images=[picture(rng)] * (i % 2), sampling=sampling)
        for i in range(11)
    ]
    tokens = {}
    for graphs in (True, False):
        with lf.Engine(model, pair.processor, lf.EngineConfig(kv_cache_bytes=1 << 24, cuda_graphs=graphs)) as engine:
            tokens[graphs] = [c.token_ids for c in engine.generate(requests)]
    assert tokens[True] == tokens[False]
