"""Answers as they are written: one JSON object a line of the input."""

from __future__ import annotations

import json
import math
from typing import Any

from llava_fast.engine import Completion, Output

Answer = dict[str, Any]


def answer_of(number: int, row_id: Any, completion: Completion) -> Answer:
    """The answer to line ``number``. ``outputs`` is there when several answers were asked for."""
    outputs = [_output(output) for output in completion.outputs]
    generated = sum(output["generated_tokens"] for output in outputs)
    answer = {"line": number, "id": row_id, **outputs[0], "prompt_tokens": completion.prompt_tokens, "error": None}
    answer["generated_tokens"] = generated
    if len(outputs) > 1:
        answer["outputs"] = outputs
    if completion.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [None if one is None else _logprob(one) for one in completion.prompt_logprobs]
    return answer


def failure_of(number: int, row_id: Any, error: Exception) -> Answer:
    """In place of an answer: what went wrong with line ``number``. It has no text, not even a part of one."""
    return {
        "line": number,
        "id": row_id,
        "text": None,
        "finish_reason": None,
        "generated_tokens": 0,
        "prompt_tokens": 0,
        "error": {"type": type(error).__name__, "message": str(error)},
    }


def to_json(answer: Answer) -> bytes:
    """One line. A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _output(output: Output) -> dict[str, Any]:
    made: dict[str, Any] = {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "generated_tokens": len(output.token_ids),
    }
    if output.logprobs:
        made["logprobs"] = [_logprob(one) for one in output.logprobs]
    return made


def _logprob(one: Any) -> dict[str, Any]:
    return {
        "token_id": one.token_id,
        "logprob": _finite(one.logprob),
        "top": [[token, _finite(logprob)] for token, logprob in one.top],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity
