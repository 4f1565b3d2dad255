"""The model for lmms-eval, with stand-ins for the parts of lmms-eval (0.7.3) that it touches."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from llava_fast.errors import InvalidRequestError


@pytest.fixture
def lmms(monkeypatch):
    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None

    stand_ins = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llava_fast.evaluate.lmms", raising=False)
    yield importlib.import_module("llava_fast.evaluate.lmms")
    sys.modules.pop("llava_fast.evaluate.lmms", None)


def test_the_manifest_names_the_class(lmms):
    module, _, name = lmms.manifest().chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is lmms.LlavaFast


def test_settings_of_a_task(lmms):
    greedy = lmms.sampling_of({"max_new_tokens": 16, "temperature": 0.7, "do_sample": False, "until": ["\n\n", ""]})
    assert (greedy.max_tokens, greedy.temperature, greedy.stop) == (16, 0.0, ("\n\n",))
    drawn = lmms.sampling_of({"temperature": 0.7, "do_sample": True, "top_p": None})
    assert (drawn.max_tokens, drawn.temperature, drawn.top_p) == (lmms.MAX_TOKENS, 0.7, 1.0)


def test_a_video_is_refused(lmms):
    with pytest.raises(InvalidRequestError, match="not video"):
        lmms.messages_of([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])


def test_a_task_is_answered(lmms, checkpoint):
    model = lmms.LlavaFast(str(checkpoint), device="cpu", kv_cache_bytes=1 << 22, max_sequences=4)
    model.task_dict = {"task": {"test": ["What?", "Where?"]}}

    def doc_to_messages(doc):
        parts = [{"type": "image", "url": Image.new("RGB", (20, 20))}, {"type": "text", "text": doc}]
        return [{"role": "user", "content": parts}]

    settings = {"max_new_tokens": 3, "until": []}
    requests = [SimpleNamespace(args=("", doc_to_messages, settings, n, "task", "test")) for n in range(2)]
    try:
        answers = model.generate_until(requests)
        assert len(answers) == 2 and answers == model.generate_until(requests)
    finally:
        model.clean()
