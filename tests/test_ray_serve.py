"""examples/ray_serve.py: two replicas on a local Ray cluster, where Ray is installed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest
import torch

import llava_fast as lf
from llava_fast.pretrained import built_in
from tests.serve.conftest import engine_messages, png, user, wait_for

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray[serve] is not installed")
ROOT = Path(__file__).parents[1]
KEY = "a-key-for-the-tests"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "LLAVA_FAST_API_KEYS": KEY}
    command = [sys.executable, str(ROOT / "examples" / "ray_serve.py"), "--port", str(port), "--num-gpus", "0"]
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--kv-cache-bytes", str(1 << 25)], env=env, stdout=out, stderr=out)
    try:
        wait_for(lambda: b"is ready at" in log.read_bytes() or process.poll() is not None, 180)
        assert process.poll() is None, log.read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.wait(60)
        _, left = psutil.wait_procs(children, 30)
        assert not left
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()


def test_answers_are_the_engines(url):
    questions = [f"What is at place {number}?" for number in range(12)]
    with lf.Engine(*lf.load(built_in(), dtype=torch.float32), lf.EngineConfig(kv_cache_bytes=1 << 24)) as engine:
        sampling = lf.SamplingParams(max_tokens=12)
        expected = engine.generate(lf.Request(messages=engine_messages(png(), q), sampling=sampling) for q in questions)

    with openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0) as client, ThreadPoolExecutor(6) as pool:

        def ask(question: str) -> str:
            made = client.chat.completions.create(
                model="llava-fast", messages=user(png(), question), max_tokens=12, temperature=0
            )
            return made.choices[0].message.content

        assert list(pool.map(ask, questions)) == [completion.outputs[0].text for completion in expected]
    assert httpx.get(url + "/version").status_code == 401


def test_text_streams_and_a_client_that_leaves_stops_its_answer(url):
    def aborted() -> bool:  # one of the replicas tells
        text = httpx.get(url + "/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        return 'finished_reason="abort",model_name="llava-fast"} 1.0' in text

    with openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0) as client:
        stream = client.chat.completions.create(
            model="llava-fast", messages=user("Go on"), max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = iter(stream)
        assert next(pieces).choices[0].delta.role == "assistant"
        assert next(pieces).choices[0].delta.content
        stream.close()
    wait_for(aborted)
