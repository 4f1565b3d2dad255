"""From a body of OpenAI's API to requests of the engine."""

from __future__ import annotations

import time
from typing import Any

from llava_fast.engine import Engine, SamplingParams
from llava_fast.serve.gate import Visit
from llava_fast.serve.problems import ApiError
from llava_fast.serve.protocol import ChatRequest, CompletionRequest, ImagePart, Message, TokenizeRequest
from llava_fast.serve.settings import Settings

_COMPLETION_TOKENS = 16  # OpenAI's default for text completions


def check_model(asked: str | None, settings: Settings) -> None:
    if asked is not None and asked != settings.model_name:
        message = f"The model '{asked[:100]}' does not exist; this server has '{settings.model_name}'."
        raise ApiError(404, message, param="model", code="model_not_found")


def plain_messages(messages: list[Message]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages in the engine's form, image parts still with their urls, and those urls in order."""
    found: list[dict[str, Any]] = []
    urls: list[str] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content: Any = message.content or ""
        if isinstance(content, list):
            parts: list[dict[str, Any]] = []
            for part in content:
                if isinstance(part, ImagePart):
                    parts.append({"type": "image", "image": part.image_url.url})
                    urls.append(part.image_url.url)
                else:
                    parts.append({"type": "text", "text": part.text})
            content = parts
        found.append({"role": role, "content": content})
    return found, urls


def sampling_of(body: ChatRequest | CompletionRequest, engine: Engine, settings: Settings) -> SamplingParams:
    """How the answers are drawn; what the client does not say is as in OpenAI's API.

    Raises:
        ApiError, InvalidRequestError: a value that is not allowed.
    """
    most = min(settings.max_tokens or engine.max_length, engine.max_length)
    if isinstance(body, ChatRequest):
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        default = most
    else:
        name, max_tokens, logprobs, default = "max_tokens", body.max_tokens, body.logprobs, _COMPLETION_TOKENS
    if max_tokens is not None and max_tokens > most:
        raise ApiError(400, f"{name} is too large: {max_tokens}; it may be {most} at most.", param=name)
    if body.n is not None and body.n > settings.max_n:
        raise ApiError(400, f"n={body.n} is above the {settings.max_n} answers that one prompt may have.", param="n")
    max_tokens = min(default, most) if max_tokens is None else max_tokens
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        n=body.n or 1,
        seed=body.seed,
        stop=body.stop or (),
        stop_token_ids=body.stop_token_ids or (),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=logprobs if isinstance(body, CompletionRequest) and body.echo else None,
    )


def request_fields(body: ChatRequest | CompletionRequest, visit: Visit, settings: Settings) -> dict[str, Any]:
    """What every request of a body has in common, besides how it is drawn."""
    if body.priority and not settings.allow_priority:
        raise ApiError(400, "this server does not let clients set a priority", param="priority")
    # Tenants do not share caches: how fast an answer comes would tell one what another has sent.
    salt = f"{visit.tenant}/{body.cache_salt or ''}"
    left = max(1e-3, settings.request_seconds - (time.monotonic() - visit.began))
    return {"priority": body.priority or 0, "cache_salt": salt, "request_id": visit.request_id, "timeout": left}


def seed_of(seed: int, prompt: int) -> int:
    """The seed of a body's prompt number ``prompt``: the first one's is what the client said, within 64 bits."""
    return (seed + prompt + (1 << 63)) % (1 << 64) - (1 << 63)


def prompts_of(body: CompletionRequest, settings: Settings) -> list[str | list[int]]:
    """The prompts of a completions request, as text or as token ids."""
    given = body.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts or [] in prompts:
        raise ApiError(400, "'prompt' is empty.", param="prompt")
    if len(prompts) > settings.max_prompts:
        message = f"{len(prompts)} prompts are more than the {settings.max_prompts} that one request may have."
        raise ApiError(400, message, param="prompt")
    n = body.n or 1
    if len(prompts) * n > settings.max_answers:
        message = (
            f"{len(prompts)} prompts with {n} answers each are more than the {settings.max_answers} of one request."
        )
        raise ApiError(400, message, param="n")
    if body.best_of not in (None, n):
        message = f"best_of={body.best_of} is not supported; leave it out, or make it n={n}."
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")
    return prompts


def token_ids(prompt: str | list[int], engine: Engine) -> list[int]:
    """The tokens of a text prompt, behind the token that begins a text; nothing in it is taken for a special token."""
    if not isinstance(prompt, str):
        return prompt
    tokenizer = engine.processor.tokenizer
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt, prefix=True)[0]


def tokenize(body: TokenizeRequest, engine: Engine) -> list[int]:
    """The tokens of a prompt or of messages, an image's rows included; no image is read."""
    tokenizer = engine.processor.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give 'prompt' or 'messages', and not both.", param="prompt")
    if body.messages is not None:
        return engine.processor.prompt(plain_messages(body.messages)[0]).input_ids.tolist()
    assert body.prompt is not None
    if body.add_special_tokens:
        return token_ids(body.prompt, engine)
    return tokenizer.encode(body.prompt, prefix=True)[0]
