"""The requests of OpenAI's API, as JSON bodies, with the extensions that vLLM's users know.

Fields that the API does not have are refused, as OpenAI's own server does ("Unknown parameter: 'x'.", code
``unknown_parameter``): a misspelt setting must not go unnoticed. Inside messages and their content parts it ignores
them, so that clients may hold notes of their own there; so do we. Fields of the API that cannot change the answer
(``user``, ``metadata``, ...) are taken and not looked at. Fields that would change it and that this server cannot
honour (``tools``, a JSON ``response_format``, ...) are refused unless they hold the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from llava_fast.serve.problems import ApiError

_SEED = (1 << 63) - 1
_STOPS = 16
Body = TypeVar("Body", bound=BaseModel)
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class _Open(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ImageUrl(_Open):
    url: str
    detail: str | None = None  # what the picture is scaled to is the model's, not the client's, to say


class ImagePart(_Open):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Open):
    type: Literal["text"]
    text: str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Open):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(_Options):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pads chunks against readers of encrypted traffic; not looked at


class _Sampling(_Options):
    """What chat and text completions have in common. None is the default, as in OpenAI's API."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-_SEED - 1, le=_SEED)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: Any = None

    # extensions
    top_k: int | None = Field(None, ge=-1, le=_SEED, description="0 or -1 for all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[Annotated[int, Field(ge=0, le=_SEED)]] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, ge=-1000, le=1000, description="lower runs first, where the server allows it")
    cache_salt: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="only requests of one salt share cached prompts and images"
    )


class ChatRequest(_Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    # nothing in the answer depends on these
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None

    # these are for what this server does not do
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class CompletionRequest(_Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: Any = None


class TokenizeRequest(_Options):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


# Values of fields for things that are not done here which ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "suffix": ("",),
}


def validate(kind: type[Body], body: bytes) -> Body:
    """A request out of the bytes of a body.

    Raises:
        ApiError: 400, what is wrong and where.
    """
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise _problem(error.errors(include_url=False, include_input=False, include_context=True)) from None
    for name, neutral in _NEUTRAL.items():
        value = getattr(parsed, name, None)
        if value is not None and value not in neutral:
            message = f"Unsupported parameter: '{name}' is not supported with this model."
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    return parsed


def _problem(details: list[ErrorDetails]) -> ApiError:
    first = next((d for d in details if d["type"] == "extra_forbidden"), None)
    first = first or max(details, key=lambda d: len(d["loc"]))  # of a union the branch that got furthest
    param = _place(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"We could not parse the JSON body of your request: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, param=param, code="missing_required_parameter")
    where = f"Invalid value for '{param}'" if param else "Invalid body"
    return ApiError(400, f"{where}: {first['msg']}.", param=param or None, code="invalid_value")


def _place(location: tuple[int | str, ...]) -> str:
    """messages[0].content, as OpenAI's server writes it; without the names of the branches of a union."""
    text, before = "", None
    for step in location:
        branch = step in ("str", "int", "float") or (isinstance(before, int) and step in ("text", "image_url"))
        if isinstance(step, int):
            text += f"[{step}]"
        elif not text:
            text = step
        elif step.isidentifier() and not branch:
            text += f".{step}"
        before = step
    return text[:100]
