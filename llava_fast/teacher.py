"""Teacher: a language model behind an OpenAI-compatible address, asked many things at once and never the same twice.

    async with OpenAITeacher("http://localhost:8000/v1", "some-model", replies=ReplyFile("replies.jsonl")) as teacher:
        reply = await teacher.ask([{"role": "user", "content": "..."}], max_tokens=512, temperature=0.2)

What can pass (rate limits, faults of the server, lost connections, timeouts, answers that are no completion) is tried
again with growing pauses; what cannot raises TeacherError. Replies that were paid for are kept in a file by what was
asked, so that a run that was killed asks only what it has no reply to.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import weakref
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from llava_fast.appended import cut_half_line, open_locked
from llava_fast.errors import ConfigError, LlavaError

Message = dict[str, Any]
LONGEST_PAUSE = 60.0  # seconds, between two tries of a request


class TeacherError(LlavaError):
    """A request that has no answer: refused as it is, or failed however often it was tried. Others go on."""


class TeacherUnusableError(TeacherError):
    """A teacher that will answer nothing: a wrong key, model or address, or a quota that is used up."""


class Reply(str):
    """The text of an answer.

    Attributes:
        finish_reason: ``"stop"``, or ``"length"`` where it was cut off at ``max_tokens``.
    """

    finish_reason: str

    def __new__(cls, text: str, finish_reason: str = "stop") -> Reply:
        reply = super().__new__(cls, text)
        reply.finish_reason = finish_reason
        return reply


class Teacher(Protocol):
    """Whoever answers: a served model, or a rule."""

    async def ask(self, messages: list[Message], *, max_tokens: int, temperature: float, draw: int = 0) -> Reply:
        """The answer to a conversation.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}``.
            draw: asks the same again for another answer, where ``temperature`` draws one.

        Raises:
            TeacherError: there is no answer.
        """
        ...


@dataclass
class Usage:
    """What a teacher was asked in this run, and what it took.

    Attributes:
        price: US dollars for a million tokens: of prompts, of answers.
    """

    price: tuple[float, float] = (0.0, 0.0)
    replies: int = 0
    from_file: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def dollars(self) -> float:
        return (self.prompt_tokens * self.price[0] + self.answer_tokens * self.price[1]) / 1e6


def count_tokens(text: str) -> int:
    """About how many tokens a text is: four characters each. For estimates, where no tokenizer is at hand."""
    return max(1, round(len(text) / 4))


class ReplyFile:
    """Replies on disk, by what was asked: a line of JSON each, only ever appended, one writer at a time.

    A line reaches the operating system whole or is taken back, and one that a kill cut short is dropped at the next
    start. Only where the lines lie is held, not the replies.

    Raises:
        ConfigError: the file cannot be opened, is being written by another process, or holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._places: dict[str, int] = {}  # key -> offset of its line
        try:
            self._file = open_locked(self.path, "choose another folder", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; choose a place that can be written") from error
        self._take_up()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record kept under ``key``."""
        at = self._places.get(key)
        if at is None:
            return None
        with self.path.open("rb") as file:
            file.seek(at)
            return json.loads(file.readline())

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record. Raises OSError, on a full disk for instance; the file is then as it was."""
        line = (json.dumps({"key": key, **record}, ensure_ascii=False) + "\n").encode()
        at = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: the disk took only a part of a reply; make room on it")
        except OSError:
            os.ftruncate(self._file.fileno(), at)
            raise
        self._places[key] = at

    def close(self) -> None:
        self._file.close()

    def _take_up(self) -> None:
        cut_half_line(self._file)
        at = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    self._places[json.loads(line)["key"]] = at
                except (ValueError, TypeError, KeyError):
                    self._file.close()
                    raise ConfigError(
                        f"line {number} of {self.path} is no reply: {line[:60]!r}; delete that line to have it asked "
                        "again, or choose another folder"
                    ) from None
                at += len(line)


class OpenAITeacher:
    """A teacher behind an OpenAI-compatible address, through the official client.

    Args:
        base_url: such as ``http://localhost:8000/v1``; None is OpenAI's own.
        model: its name there.
        api_key: sent to the address and written nowhere; a local server mostly wants none.
        replies: file of replies; without one nothing is kept.
        at_once: most requests on their way at a time.
        per_minute: most requests begun in a minute; None for no bound.
        tries: of a request, the first included.
        timeout: seconds for one try, from connecting to the last byte.
        pause: seconds before the second try; doubled for each one after it, at most LONGEST_PAUSE.
        price: US dollars for a million tokens, of prompts and of answers; for ``usage.dollars``.

    Raises:
        ConfigError: the client is not installed, or a value cannot work.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        api_key: str | None = None,
        *,
        replies: ReplyFile | None = None,
        at_once: int = 8,
        per_minute: float | None = None,
        tries: int = 8,
        timeout: float = 120.0,
        pause: float = 1.0,
        price: tuple[float, float] = (0.0, 0.0),
    ):
        try:
            import openai
        except ImportError as error:
            raise ConfigError("a teacher needs the openai client: pip install 'llava-fast[datagen]'") from error
        for name, value in (("at_once", at_once), ("tries", tries), ("timeout", timeout), ("per_minute", per_minute)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        if base_url is None and not api_key:
            raise ConfigError("OpenAI's own address wants an API key: set OPENAI_API_KEY, or give another address")
        self.model, self.usage = model, Usage(price)
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            base_url=base_url or "https://api.openai.com/v1", api_key=api_key or "none", max_retries=0, timeout=timeout
        )
        self._replies, self._tries, self._timeout, self._pause = replies, tries, timeout, pause
        self._slots = asyncio.Semaphore(at_once)
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next_start = 0.0  # time.monotonic() before which no request begins
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def __aenter__(self) -> OpenAITeacher:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections; the file of replies stays open."""
        await self._client.close()

    async def ask(self, messages: list[Message], *, max_tokens: int, temperature: float, draw: int = 0) -> Reply:
        """The answer, from the file where it has been given before.

        Raises:
            TeacherUnusableError: no request to this teacher can succeed.
            TeacherError: this one cannot.
            OSError: the reply could not be written to the file.
        """
        request = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        key = self.key(messages, max_tokens=max_tokens, temperature=temperature, draw=draw)
        lock = self._asking.setdefault(key, asyncio.Lock())
        async with lock:  # two who ask the same at once: the second finds the first one's reply in the file
            known = self._replies.get(key) if self._replies is not None else None
            if known is not None:
                self.usage.from_file += 1
                return Reply(known["text"], known["finish_reason"])
            async with self._slots:
                return await self._ask(key, request)

    def key(self, messages: list[Message], *, max_tokens: int, temperature: float, draw: int = 0) -> str:
        """What a reply is kept under: a digest of all that it depends on."""
        asked = json.dumps([self.model, messages, max_tokens, temperature, draw], sort_keys=True)
        return blake2b(asked.encode(), digest_size=16).hexdigest()

    async def _ask(self, key: str, request: dict[str, Any]) -> Reply:
        for attempt in range(1, self._tries + 1):
            await self._wait_for_turn()
            try:
                completion = await asyncio.wait_for(
                    self._client.chat.completions.create(model=self.model, **request), self._timeout
                )
                return self._keep(key, request, completion)
            except (self._openai.APIError, TimeoutError, _Unreadable, ValueError) as error:
                self._raise_if_final(error)
                if attempt == self._tries:
                    raise TeacherError(f"no answer in {attempt} tries; the last one: {_tell(error)}") from error
                self.usage.retries += 1
                await self._back_off(error, attempt)
        raise AssertionError("unreachable")

    async def _wait_for_turn(self) -> None:
        while (wait := self._next_start - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next_start = time.monotonic() + self._interval

    async def _back_off(self, error: Exception, attempt: int) -> None:
        pause = min(LONGEST_PAUSE, self._pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        if isinstance(error, self._openai.RateLimitError):  # for everybody: who goes on only makes it longer
            pause = max(pause, _retry_after(error))
            self._next_start = max(self._next_start, time.monotonic() + pause)
        await asyncio.sleep(pause)

    def _raise_if_final(self, error: Exception) -> None:
        """Raise what another try cannot mend."""
        o = self._openai
        quota = isinstance(error, o.RateLimitError) and error.code == "insufficient_quota"
        if quota or isinstance(error, (o.AuthenticationError, o.PermissionDeniedError, o.NotFoundError)):
            raise TeacherUnusableError(
                f"the teacher {self.model!r} at {self._client.base_url} answers nothing ({_tell(error)}); check "
                "address, model name, key and quota"
            ) from error
        if isinstance(error, o.APIStatusError) and error.status_code < 500 and error.status_code not in (408, 409, 429):
            raise TeacherError(f"the teacher will not take this request: {_tell(error)}") from error

    def _keep(self, key: str, request: dict[str, Any], completion: Any) -> Reply:
        reply = _read(completion)
        usage = getattr(completion, "usage", None)
        asked = "".join(str(message["content"]) for message in request["messages"])
        prompt_tokens = usage.prompt_tokens if usage else count_tokens(asked)
        answer_tokens = usage.completion_tokens if usage else count_tokens(reply)
        self.usage.replies += 1
        self.usage.prompt_tokens += prompt_tokens
        self.usage.answer_tokens += answer_tokens
        if self._replies is not None:
            record = {"model": self.model, "text": str(reply), "finish_reason": reply.finish_reason}
            self._replies.put(key, {**record, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens})
        return reply


class _Unreadable(Exception):
    """The server said 200 and sent something that is no completion."""


def _read(completion: Any) -> Reply:
    try:
        choice = completion.choices[0]
        if choice.finish_reason is None:
            raise _Unreadable("an answer without an end")
        return Reply(choice.message.content or "", choice.finish_reason)
    except (AttributeError, IndexError, TypeError) as error:
        raise _Unreadable(f"the answer is no chat completion: {str(completion)[:80]!r}") from error


def _retry_after(error: Any) -> float:
    """Seconds that the server asks to wait, 0 where it does not say."""
    try:
        return min(10 * LONGEST_PAUSE, max(0.0, float(error.response.headers.get("retry-after", 0))))
    except ValueError:  # a date
        return LONGEST_PAUSE


def _tell(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:300]
