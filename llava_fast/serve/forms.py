"""Answers in the forms of OpenAI's API: chat and text completions, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from typing import Any

from llava_fast.engine import Completion, Delta
from llava_fast.engine.request import Output, TokenLogprob
from llava_fast.processor import Tokenizer
from llava_fast.serve.tokens import bytes_of, text_of


def usage_of(completions: list[Completion]) -> dict[str, Any]:
    prompt = sum(c.prompt_tokens for c in completions)
    answer = sum(len(output.token_ids) for c in completions for output in c.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {
            "cached_tokens": sum(c.cached_tokens for c in completions),
            "image_tokens": sum(c.image_tokens for c in completions),
        },
    }


class Form:
    """The envelope that chunks and whole answers share.

    Args:
        model: as the client calls it.
        tokenizer: for the texts of tokens in log-probabilities.
        version: of this software: with ``seed``, what answers depend on.
        silent: tokens that end an answer and are no part of its text.
    """

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str, tokenizer: Tokenizer, version: str, silent: frozenset[int]):
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._tokenizer, self._silent = tokenizer, silent
        self._common = {"created": int(time.time()), "model": model, "system_fingerprint": version}

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        choices = []
        for prompt, completion in enumerate(completions):
            for output in completion.outputs:
                index = prompt * len(completion.outputs) + output.index
                choices.append({"index": index, **self.answer(prompt, completion, output)})
        return {"id": self.id, "object": self.kind, **self._common, "choices": choices, "usage": usage_of(completions)}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": self.chunk_kind, **self._common, "choices": choices, **more}

    def answer(self, prompt: int, completion: Completion, output: Output) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    def opening(self, prompt: int) -> dict[str, Any] | None:
        """What a choice of a stream begins with."""
        raise NotImplementedError

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """One choice of a chunk."""
        raise NotImplementedError

    def _said(self, scores: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> list[TokenLogprob]:
        """Without the token that ends the answer."""
        return [score for score in scores if score.token_id not in self._silent]


class ChatForm(Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def answer(self, prompt: int, completion: Completion, output: Output) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
        }

    def opening(self, prompt: int) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, scores: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not scores:
            return None
        content = [
            {
                **self._entry(score.token_id, score.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in score.top],
            }
            for score in self._said(scores)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = bytes_of(self._tokenizer, token)
        return {"token": text_of(self._tokenizer, token), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class CompletionForm(Form):
    """Args: echoes: by prompt, the text that comes before each of its answers. See :class:`Form` for the others."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, echoes: list[str]):
        super().__init__(*args)
        self._echoes = echoes
        self._lengths: dict[int, int] = {}  # by choice, characters of the tokens in the chunks so far

    def answer(self, prompt: int, completion: Completion, output: Output) -> dict[str, Any]:
        scores: list[TokenLogprob | None] = []
        if completion.prompt_logprobs is not None:
            scores += completion.prompt_logprobs[1:]  # the first begins every text and is predicted by nothing
        scores += self._said(output.logprobs)
        return {
            "text": self._echoes[prompt] + output.text,
            "logprobs": self._logprobs(scores, 0) if scores else None,
            "finish_reason": output.finish_reason,
        }

    def opening(self, prompt: int) -> dict[str, Any] | None:
        return {"text": self._echoes[prompt], "logprobs": None, "finish_reason": None} if self._echoes[prompt] else None

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        said, offset = self._said(delta.logprobs), self._lengths.get(index, 0)
        self._lengths[index] = offset + sum(len(text_of(self._tokenizer, score.token_id)) for score in said)
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(list(said), offset) if said else None,
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, scores: list[TokenLogprob | None], offset: int) -> dict[str, Any]:
        tokens, offsets = [], []
        known = [score for score in scores if score is not None]
        for score in known:
            text = text_of(self._tokenizer, score.token_id)
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [max(score.logprob, -9999.0) for score in known],
            "top_logprobs": [
                {text_of(self._tokenizer, token): max(logprob, -9999.0) for token, logprob in score.top} or None
                for score in known
            ],
            "text_offset": offsets,
        }
