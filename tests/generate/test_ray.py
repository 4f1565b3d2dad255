"""A data set through a local Ray cluster, where Ray is installed."""

from __future__ import annotations

import pytest

import llava_fast as lf
from llava_fast.errors import ConfigError
from llava_fast.generate import ray as generate_ray

CONFIG = lf.EngineConfig(kv_cache_bytes=1 << 21, max_sequences=4, max_queue=3)
SAMPLING = {"max_tokens": 4}


def test_plain_values():
    """Arrow gives every record the fields of all others."""
    row = {"id": 3, "image": ["a"], "sampling": {"seed": None, "stop": ["."]}, "messages": [{"x": None}], "y": None}
    assert generate_ray.plain(row) == {
        "id": 3,
        "image": ["a"],
        "sampling": {"stop": ["."]},
        "messages": [{}],
    }


def test_without_ray(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava-fast\[ray\]'"):
        generate_ray.generate_dataset(None, "model")


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


def test_a_local_cluster(cluster, checkpoint, loaded):
    """The answers are the library's; a bad row says so in its own place; columns that were there stay."""
    picture = (checkpoint / "a.png").read_bytes()
    rows = [
        {"id": n, "prompt": f"Tell me about {n}.", "image": None if n % 3 else picture, "sampling": {"top_k": n % 2}}
        for n in range(12)
    ]
    rows[4]["image"] = b"no picture"
    rows[5]["sampling"] = {"n": 2}
    dataset = cluster.data.from_items(rows, override_num_blocks=3)
    answered = generate_ray.generate_dataset(
        dataset, checkpoint, config=CONFIG, sampling=SAMPLING, num_gpus=0, batch_size=4
    ).take_all()
    found = {row["id"]: row for row in answered}
    assert sorted(found) == list(range(12))
    assert found[4]["error"].startswith("ImageError: ") and found[4]["answer"] is None
    assert found[5]["error"].startswith("InvalidRequestError: n=2 where a row has one answer")
    assert found[1]["prompt"] == "Tell me about 1."

    with lf.Engine(*loaded, CONFIG, background=False) as engine:
        for number in {*range(12)} - {4, 5}:
            image = [] if number % 3 else [{"type": "image", "image": picture}]
            content = [*image, {"type": "text", "text": f"Tell me about {number}."}]
            request = lf.Request(
                messages=[{"role": "user", "content": content}], sampling=lf.SamplingParams(**SAMPLING)
            )
            expected = engine.submit(request).result()
            row = found[number]
            assert (row["answer"], row["finish_reason"], row["error"]) == (expected.text, "length", None)
            assert (row["generated_tokens"], row["prompt_tokens"]) == (4, expected.prompt_tokens)
