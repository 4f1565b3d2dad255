"""A model for lmms-eval, so that the other public benchmarks come from the tool that people already use.

    pip install 'llava-fast[lmms-eval]'
    python -m lmms_eval --model llava_fast --model_args pretrained=llava-v1.5-7b --tasks mme,mmmu_val,textvqa_val

lmms-eval finds it through the entry point ``lmms_eval.models`` of this package. All requests of a task go to the engine
at once; ``--batch_size`` is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms

from llava_fast.engine import Engine, EngineConfig, Request, SamplingParams
from llava_fast.errors import ConfigError, InvalidRequestError
from llava_fast.generate.setup import default_dtype
from llava_fast.pretrained import load

MAX_TOKENS = 1024  # of an answer, where the task does not say


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_fast", chat_class_path=f"{__name__}.LlavaFast")


class LlavaFast(lmms):
    """Args:
    pretrained: LLaVA directory or hub id.
    device: default CUDA where there is one.
    dtype: "float32", "bfloat16" or "float16"; default bfloat16 on CUDA, float32 on a CPU.
    quantization: None, "int8", "int4" or "fp8".
    engine: further arguments are fields of :class:`~llava_fast.engine.EngineConfig`.
    """

    is_simple = False  # it takes messages

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **engine: Any,
    ):
        super().__init__()
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = getattr(torch, dtype or default_dtype(where))
        self._engine = Engine(
            *load(pretrained, device=where, dtype=kind, quantization=quantization), EngineConfig(**engine)
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        completions = self._engine.generate(self._request(one) for one in requests)
        for one, completion in zip(requests, completions, strict=True):
            if completion.error is not None:
                raise ConfigError(f"{one.args[4]}, document {one.args[3]}: {completion.error}") from completion.error
        return [completion.text.strip() for completion in completions]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("llava_fast answers tasks of one round; leave tasks of several out of --tasks")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "llava_fast answers tasks that generate; leave those with loglikelihood out of --tasks"
        )

    def clean(self) -> None:
        self._engine.close()

    def _request(self, one: Any) -> Request:
        _, doc_to_messages, settings, doc_id, task, split = one.args
        return Request(
            messages=messages_of(doc_to_messages(self.task_dict[task][split][doc_id])), sampling=sampling_of(settings)
        )


def messages_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages, whose media are ``{"type", "url"}``, as a request takes them.

    Raises:
        InvalidRequestError: a part is neither text nor an image.
    """
    return [{"role": message["role"], "content": [_part(part) for part in message["content"]]} for message in messages]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] not in ("text", "image"):
        raise InvalidRequestError(f"LLaVA takes text and images, not {part['type']}; leave this task out of --tasks")
    return dict(part) if part["type"] == "text" else {"type": "image", "image": part["url"]}


def sampling_of(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's ``generation_kwargs``. Without ``do_sample`` a temperature counts where it is given; 0 is greedy."""
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
    until = settings.get("until") or ()
    return SamplingParams(
        max_tokens=int(settings.get("max_new_tokens", MAX_TOKENS)),
        temperature=temperature,
        top_p=float(settings.get("top_p") or 1.0),
        stop=[until] if isinstance(until, str) else [text for text in until if text],
    )
