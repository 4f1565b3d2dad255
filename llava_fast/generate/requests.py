"""Rows to requests: what a line of the input, or a row of a data set, may say.

A row is ``{"id", "image": a path or a list of them, "prompt": text, "sampling": {...}}``, or has ``messages`` in OpenAI
form in place of ``image`` and ``prompt``. ``question_id`` and ``text``, the names of LLaVA-Bench, stand for ``id`` and
``prompt``. Only the prompt or the messages must be there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llava_fast.engine import Request, SamplingParams
from llava_fast.errors import InvalidRequestError
from llava_fast.generate.prompts import Line

SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))


def parse(line: Line) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        InvalidRequestError: there is none.
    """
    try:
        row = json.loads(line.raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"line {line.number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InvalidRequestError(f"line {line.number} is {line.raw[:40]!r}; it must be a JSON object with a 'prompt'")
    return row


def id_of(row: Mapping[str, Any], number: int) -> Any:
    """The row's own id, or its number where it has none."""
    for name in ("id", "question_id"):
        if row.get(name) is not None:
            return row[name]
    return number


def request_of(
    row: Mapping[str, Any], number: int, *, defaults: Mapping[str, Any], seed: int | None, image_dir: Path | None
) -> Request:
    """The request that a row asks for.

    Args:
        row: as this module's page says. An image may also be anything else that a request takes.
        number: of the row, from which together with ``seed`` its draws follow.
        defaults: fields of SamplingParams, where the row's ``sampling`` does not say otherwise.
        seed: of the run; a row's own seed is taken as it is. None: draws differ from run to run.
        image_dir: what paths of images are relative to; None leaves them as they are.

    Raises:
        InvalidRequestError: the row is malformed.
    """
    misplaced = [name for name in SAMPLING if name in row]
    if misplaced:
        raise InvalidRequestError(f"{misplaced[0]!r} stands beside the prompt; put it under 'sampling'")
    return Request(messages=_messages(row, image_dir), sampling=_sampling(row, number, defaults, seed))


def _messages(row: Mapping[str, Any], image_dir: Path | None) -> list[dict[str, Any]]:
    messages, text = row.get("messages"), row.get("prompt")
    text = row.get("text") if text is None else text
    if (messages is None) == (text is None):
        raise InvalidRequestError("a row needs 'prompt' or 'messages', and not both")
    if messages is not None:
        if row.get("image") is not None:
            raise InvalidRequestError("'image' stands beside 'messages'; put it into a message as a part")
        return _with_paths(messages, image_dir)
    if not isinstance(text, str):
        raise InvalidRequestError(f"'prompt' is {text!r:.80}; it must be text")
    image = row.get("image")
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    parts = [{"type": "image", "image": _placed(one, image_dir)} for one in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _with_paths(messages: Any, image_dir: Path | None) -> list[dict[str, Any]]:
    """The messages with the paths of their images placed; what is malformed stays for the engine to refuse."""
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise InvalidRequestError(f"'messages' is {messages!r:.80}; it must be a list of objects")
    return [
        {**message, "content": [_part(part, image_dir) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _part(part: Any, image_dir: Path | None) -> Any:
    if isinstance(part, dict) and part.get("type") == "image":
        return {**part, "image": _placed(part.get("image"), image_dir)}
    return part


def _placed(image: Any, image_dir: Path | None) -> Any:
    return image_dir / image if isinstance(image, str) and image_dir is not None else image


def _sampling(row: Mapping[str, Any], number: int, defaults: Mapping[str, Any], seed: int | None) -> SamplingParams:
    changes = row.get("sampling") or {}
    if not isinstance(changes, Mapping):
        raise InvalidRequestError(f"'sampling' is {changes!r:.80}; it must be an object such as {{'temperature': 0.7}}")
    unknown = [name for name in changes if name not in SAMPLING]
    if unknown:
        raise InvalidRequestError(f"'sampling' has {unknown[0]!r:.80}, which is none of {', '.join(SAMPLING)}")
    values = {"seed": None if seed is None else _seed(seed, number), **defaults, **changes}
    try:
        if "logit_bias" in values:  # names in JSON are text
            values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
        return SamplingParams(**values)
    except InvalidRequestError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequestError(f"'sampling' {dict(changes)!r:.200} cannot be understood: {error}") from error


def _seed(seed: int, number: int) -> int:
    """One seed a row: the same whatever else is answered, in whichever run and by whichever process."""
    digest = blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
