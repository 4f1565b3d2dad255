"""The app: routes of OpenAI's API on an engine. It stands by itself or is mounted in another ASGI app.

app = create_app(engine)                    # uvicorn.run(app)
other.mount("/llava", create_app(engine))   # every path below /llava, the page too
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

import llava_fast
from llava_fast.engine import Completion, Engine, Handle, Request
from llava_fast.errors import LlavaError
from llava_fast.serve import asking, body, problems
from llava_fast.serve.answers import Answer, while_there
from llava_fast.serve.conversations import Conversations
from llava_fast.serve.forms import ChatForm, CompletionForm
from llava_fast.serve.gate import Gate, Visit
from llava_fast.serve.health import Health
from llava_fast.serve.images import load_images, with_images
from llava_fast.serve.metrics import Metrics
from llava_fast.serve.page import page_route
from llava_fast.serve.problems import ApiError
from llava_fast.serve.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from llava_fast.serve.settings import Settings

_INLINE = 1 << 13  # characters or ids of a prompt that are tokenized within a millisecond or two


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """An ASGI app on ``engine``, which stays the caller's to close. ``app.state.gate`` counts and drains requests.

    Raises:
        ConfigError, OSError: the file for conversations cannot be written.
    """
    server = _Server(engine, settings or Settings())
    app = FastAPI(
        title="llava_fast",
        version=llava_fast.__version__,
        description="OpenAI's API on llava_fast's engine.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=server.lifespan,
    )
    app.state.gate = server.gate
    post = _Posts(app)
    post("/v1/chat/completions", server.chat, ChatRequest)
    post("/v1/completions", server.complete, CompletionRequest)
    post("/tokenize", server.tokenize, TokenizeRequest)
    for path, act in (
        ("/v1/models", server.models),
        ("/health", server.health),
        ("/version", server.version),
        ("/metrics", server.numbers),
    ):
        app.get(path, response_class=Response, responses=_answers("5XX"))(act)
    app.get("/v1/models/{name:path}", response_class=Response, responses=_answers("4XX", "5XX"))(server.model)
    app.router.routes.append(page_route())
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(server.gate.wrap)  # type: ignore[arg-type]
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


class _Server:
    """What the routes share."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self._metrics = Metrics(engine, settings.model_name)
        self.gate = Gate(settings, self._metrics)
        self._health = Health(engine, settings)
        self._threads = body.Threads()
        self._conversations = Conversations(settings.conversations) if settings.conversations else None
        self._created = int(time.time())
        tokenizer = engine.processor.tokenizer
        self._silent = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        if self._conversations is not None:
            self._conversations.close()

    # ---- questions

    async def chat(self, http: HttpRequest) -> Response:
        """Answers to a conversation, with pictures in it."""
        asked = await body.read(ChatRequest, http, self.gate, self._threads)
        visit: Visit = http.scope["visit"]
        asking.check_model(asked.model, self.settings)
        sampling = asking.sampling_of(asked, self.engine, self.settings)
        messages, urls = asking.plain_messages(asked.messages)
        visit.notes["images"] = len(urls)
        if urls:
            loading = load_images(urls, self.settings, self._threads)
            messages = with_images(messages, await while_there(http.receive, loading))
        await self._moderate(messages, http)
        length = sum(len(m.content) if isinstance(m.content, str) else _length(m.content or ()) for m in asked.messages)
        fields = asking.request_fields(asked, visit, self.settings)
        handle = await self._submit(Request(messages=messages, sampling=sampling, **fields), length)
        form = ChatForm(self.settings.model_name, self.engine.processor.tokenizer, _FINGERPRINT, self._silent)
        return self._answer([handle], form, asked, visit, messages)

    async def complete(self, http: HttpRequest) -> Response:
        """Continuations of texts, or of token ids."""
        asked = await body.read(CompletionRequest, http, self.gate, self._threads)
        visit: Visit = http.scope["visit"]
        asking.check_model(asked.model, self.settings)
        sampling = asking.sampling_of(asked, self.engine, self.settings)
        prompts = asking.prompts_of(asked, self.settings)
        await self._moderate([{"role": "user", "content": self._text(prompt)} for prompt in prompts], http)
        fields = asking.request_fields(asked, visit, self.settings)
        handles: list[Handle] = []
        try:
            for number, prompt in enumerate(prompts):
                ids = await self._near_or_far(len(prompt), asking.token_ids, prompt, self.engine)
                one = replace(sampling, seed=None if sampling.seed is None else asking.seed_of(sampling.seed, number))
                handles.append(await self._submit(Request(token_ids=ids, sampling=one, **fields), len(ids)))
            echoes = [self._text(prompt) if asked.echo else "" for prompt in prompts]
            form = CompletionForm(
                self.settings.model_name, self.engine.processor.tokenizer, _FINGERPRINT, self._silent, echoes=echoes
            )
            return self._answer(handles, form, asked, visit, prompts)
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    async def tokenize(self, http: HttpRequest) -> Response:
        """The tokens of a text, or of messages as the model gets them."""
        asked = await body.read(TokenizeRequest, http, self.gate, self._threads)
        asking.check_model(asked.model, self.settings)
        try:
            ids = await self._threads.run(asking.tokenize, asked, self.engine)
        except LlavaError as error:
            raise ApiError(400, str(error)) from None
        found: dict[str, Any] = {"count": len(ids), "max_model_len": self.engine.max_length, "tokens": ids}
        if asked.return_token_strs:
            tokenizer = self.engine.processor.tokenizer
            found["token_strs"] = await self._threads.run(lambda: [tokenizer.piece(i) if i >= 0 else None for i in ids])
        return JSONResponse(found)

    async def _submit(self, request: Request, length: int) -> Handle:
        try:
            return await self._near_or_far(length, self.engine.submit, request)
        except LlavaError as error:
            raise problems.of_engine(error) or error from error

    async def _near_or_far(self, length: int, work: Callable[..., Any], *args: Any) -> Any:
        """Work that grows with a prompt: short ones here, where a thread would take longer to begin."""
        return work(*args) if length <= _INLINE else await self._threads.run(work, *args)

    def _answer(self, handles: list[Handle], form: Any, asked: Any, visit: Visit, given: Any) -> Response:
        async def finished(completions: list[Completion]) -> None:
            if self._conversations is not None:
                tenant = visit.tenant
                await self._threads.run(self._conversations.write, visit.request_id, tenant, given, completions)

        options = asked.stream_options
        return Answer(
            handles,
            form,
            stream=bool(asked.stream),
            include_usage=bool(options and options.include_usage),
            send_seconds=self.settings.send_seconds,
            event_seconds=self.settings.event_seconds,
            gate=self.gate,
            finished=finished,
        )

    async def _moderate(self, messages: list[dict[str, Any]], http: HttpRequest) -> None:
        if self.settings.moderate is None:
            return
        async with asyncio.timeout(self.settings.request_seconds):  # what it raises is a 500: nothing gets past it
            refused = await while_there(http.receive, self.settings.moderate(messages))
        if refused is not None:
            raise ApiError(400, f"The request was refused: {refused}", code="content_policy_violation")

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.engine.processor.decode(prompt)

    # ---- about the server

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The same, by its name."""
        asking.check_model(name, self.settings)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        length = self.engine.max_length
        name = self.settings.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "llava_fast",
            "max_model_len": length,
        }

    async def health(self) -> Response:
        """Whether the engine makes tokens: one is made, where none was lately."""
        wrong = "the server is shutting down" if self.gate.draining else await self._health.check()
        if wrong:
            raise problems.unavailable(wrong, "unhealthy")
        return JSONResponse({"status": "ok"})

    async def version(self) -> Response:
        return JSONResponse({"version": llava_fast.__version__})

    async def numbers(self) -> Response:
        """Numbers for Prometheus."""
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


_FINGERPRINT = f"llava_fast-{llava_fast.__version__}"


def _length(parts: Any) -> int:
    return sum(len(getattr(part, "text", "")) for part in parts)


async def _no_route(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = http.scope["path"][:100]
    words = {404: f"Unknown request URL: {http.method[:16]} {path}.", 405: f"{http.method[:16]} is not allowed here."}
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = words.get(error.status_code, "The request cannot be read.")
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


# ---- the OpenAPI document

_ERROR = {
    "description": "What is wrong",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


def _answers(*statuses: str) -> dict[int | str, dict[str, Any]]:
    return {status: _ERROR for status in statuses}


class _Posts:
    """Adds routes that read their bodies themselves, under limits, with the bodies' schemas in the document."""

    def __init__(self, app: FastAPI):
        self._app = app

    def __call__(self, path: str, act: Callable[[HttpRequest], Awaitable[Response]], kind: type[BaseModel]) -> None:
        schema = _inlined(kind.model_json_schema())
        document = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        add = self._app.post(path, response_class=Response, openapi_extra=document, responses=_answers("4XX", "5XX"))
        add(act)


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references, which would not resolve from inside the document."""
    parts = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(parts[value["$ref"].rpartition("/")[2]])
            return {name: resolve(one) for name, one in value.items() if name != "discriminator"}
        return [resolve(one) for one in value] if isinstance(value, list) else value

    return resolve(schema)
