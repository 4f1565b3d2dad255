"""What goes into the engine and what comes out: requests and sampling settings; deltas and completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_fast.errors import InvalidRequestError
from llava_fast.processor.image import ImageSource


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of an answer are chosen and where it ends.

    Attributes:
        max_tokens: most tokens of one answer; fewer where the context is full.
        min_tokens: nothing ends the answer before this many tokens.
        temperature: 0 takes the likeliest token; 1 draws from the model's distribution.
        top_k: draw from this many likeliest tokens; 0 for all.
        top_p: draw from the smallest set of likeliest tokens whose probability reaches this.
        min_p: leave out tokens less likely than this share of the likeliest.
        repetition_penalty: divides (where negative, multiplies) the logits of tokens in the prompt or the answer.
        presence_penalty: subtracted from the logits of tokens that the answer holds.
        frequency_penalty: subtracted from them once for each time they occur.
        logit_bias: token id to what is added to its logit; ``-inf`` bans it.
        n: answers to one prompt, each drawn on its own.
        seed: of the draws; one seed gives one answer, whatever else the engine is doing. None: another each time.
        stop: texts that end the answer. They are not part of it.
        stop_token_ids: tokens that end the answer, besides the end of text.
        include_stop: leave the stop text in the answer.
        ignore_eos: go on after the end of text.
        logprobs: None for none, 0 for those of the chosen tokens, k for those of the k likeliest as well.
        prompt_logprobs: the same for the tokens of the prompt. The prompt is then computed without the prefix cache.

    Raises:
        InvalidRequestError: on construction, a setting outside its range.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0)
        _whole("top_k", self.top_k, 0)
        _whole("n", self.n, 1)
        _within("temperature", self.temperature, 0.0, math.inf)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _within("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _within("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if not self.top_p or not self.repetition_penalty:
            raise InvalidRequestError(f"top_p={self.top_p} and {self.repetition_penalty=} must be above 0")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, 100)
        if self.seed is not None:
            _whole("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequestError(f"stop={self.stop!r:.80} must be texts of at least one character")
        for token, bias in self.logit_bias.items():
            _whole("a token id in logit_bias", token, 0)
            if math.isnan(bias) or bias == math.inf:
                raise InvalidRequestError(
                    f"logit_bias of token {token} is {bias}; give a finite number, or -inf to ban it"
                )
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def simple(self) -> bool:
        """Whether a token is all that is wanted, and none is favoured."""
        return not (self.logit_bias or self.min_tokens or self.logprobs is not None)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return self.greedy and self.simple and not self.penalizes


def _whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}"
        raise InvalidRequestError(f"{name}={value!r} must be {wanted}")


def _within(name: str, value: Any, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise InvalidRequestError(f"{name}={value!r} must be a number from {low} to {high}, and finite")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, as ``messages`` or as ``token_ids``.

    Attributes:
        messages: OpenAI form; see :func:`~llava_fast.processor.conversation.encode_prompt`. An image is a path, bytes,
            PIL image, array or tensor.
        token_ids: instead of messages, a prompt that is tokenized already: the processor's ``image_token_id`` stands
            once for each of ``images``.
        images: the images of ``token_ids``, in order.
        sampling: how the answer is chosen.
        priority: of two waiting requests the one with the lower number runs first; of two running ones the one with
            the higher number gives way when the cache is full.
        timeout: seconds from submission after which the request fails with :class:`~llava_fast.errors.DeadlineError`.
        cache_salt: requests share cached prefixes and image features only with those of the same salt, such as a
            tenant's name: what others sent cannot be guessed from how fast an answer comes.
        request_id: to recognise it by; made up when not given.

    Raises:
        InvalidRequestError: on construction, settings that are of another kind or outside their range.
    """

    messages: Sequence[dict[str, Any]] | None = None
    token_ids: Sequence[int] | None = None
    images: Sequence[ImageSource] = ()
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""
    request_id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequestError(f"sampling={self.sampling!r:.80} must be SamplingParams")
        if not isinstance(self.cache_salt, str):
            raise InvalidRequestError(f"cache_salt={self.cache_salt!r:.80} must be a text")
        _whole("priority", self.priority, -(1 << 63), (1 << 63) - 1)
        if self.timeout is not None:
            _within("timeout", self.timeout, 0.0, math.inf)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model, before penalties, bias and temperature.

    Attributes:
        token_id: the token.
        logprob: natural logarithm.
        top: the likeliest tokens at this place as (token id, logprob), likeliest first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What is new in one answer of a request since the delta before: one token, or as many as came meanwhile.

    Attributes:
        text: may be empty: characters that could still become a stop text, or are not complete, are held back.
        token_ids: the new tokens; the one that ends the answer is the last of them.
        finish_reason: None while the answer goes on, then "stop" or "length".
        index: which of the ``n`` answers.
        logprobs: one a token, when asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class Output:
    """One whole answer; the fields are those of :class:`Delta`, added up."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Completion:
    """All that came of a request.

    Attributes:
        outputs: the ``n`` answers.
        prompt_tokens: of them ``image_tokens`` image rows and ``cached_tokens`` found in the prefix cache.
        prompt_logprobs: one a prompt token when asked for; None for the first, which nothing predicts.
        queue_s, first_token_s, total_s: seconds from submission to the first computation, to the first token, to the
            end. None where it did not come to that.
        error: what ended the request, in completions of ``generate``; ``Handle.result`` raises it instead.
    """

    request_id: str
    outputs: list[Output]
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None
    error: Exception | None = None

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the first answer, the one that ended it included."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """ "stop" or "length", of the first answer; None where it did not come to its end."""
        return self.outputs[0].finish_reason
