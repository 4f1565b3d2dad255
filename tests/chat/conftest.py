"""The built-in model, a picture that it can talk about, and what the engine says of it."""

from __future__ import annotations

import pytest
import torch

import llava_fast as lf
from llava_fast.data.scenes import held_out
from llava_fast.pretrained import built_in


@pytest.fixture(scope="session")
def quizzes():
    return held_out(4, seed=5)


@pytest.fixture(scope="session")
def picture(quizzes, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a scene.png"  # a space, as photos have
    quizzes[0].image.save(path)
    return path


@pytest.fixture(scope="package")
def engine():
    with lf.Engine(*lf.load(built_in(), dtype=torch.float32), lf.EngineConfig(kv_cache_bytes=8 << 20)) as engine:
        yield engine


@pytest.fixture(scope="package")
def greedy(engine, picture):
    """Answers to questions about the picture, one conversation, as the engine gives them."""

    def answers(questions, tokens=512):
        messages, said = [], []
        for number, question in enumerate(questions):
            image = [] if number else [{"type": "image", "image": str(picture)}]
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            made = engine.generate([lf.Request(messages=messages, sampling=lf.SamplingParams(max_tokens=tokens))])
            said.append(made[0].text.strip())
            messages.append({"role": "assistant", "content": said[-1]})
        return said

    return answers
