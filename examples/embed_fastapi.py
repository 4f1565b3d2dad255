"""An engine inside a FastAPI app: python examples/embed_fastapi.py MODEL [--port 8000]

curl -N --data-binary @photo.jpg 'localhost:8000/ask?question=What+is+this'

Needs llava-fast[serve]. The answer is streamed; when the client goes away its request is cancelled and all that it held
is free for others.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

import llava_fast as lf
from llava_fast.errors import EngineClosedError, ImageError, InvalidRequestError, LlavaError, QueueFullError


def create_app(model: str, config: lf.EngineConfig | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loaded = await run_in_threadpool(lf.load, model)
        with lf.Engine(*loaded, config) as app.state.engine:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/ask")
    async def ask(http: Request, question: str, max_tokens: int = 256) -> Response:
        """The body is an image file, or empty for a question without one."""
        return Answer(submit(app.state.engine, question, await http.body(), max_tokens))

    return app


def submit(engine: lf.Engine, question: str, image: bytes, max_tokens: int) -> lf.Handle:
    parts = [{"type": "image", "image": image}] if image else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    try:
        return engine.submit(lf.Request(messages=messages, sampling=lf.SamplingParams(max_tokens=max_tokens)))
    except InvalidRequestError as error:
        raise HTTPException(400, str(error)) from error
    except (QueueFullError, EngineClosedError) as error:
        raise HTTPException(503, str(error)) from error


class Answer(Response):
    """Streams the text of a handle. The first token decides the status, so that a bad image is an HTTP error."""

    def __init__(self, handle: lf.Handle):
        super().__init__()
        self.handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.handle:  # whatever ends the response early cancels the request
            deltas = aiter(self.handle)
            response: Response
            try:
                first = await anext(deltas)
                response = StreamingResponse(texts(first, deltas), media_type="text/plain; charset=utf-8")
            except (InvalidRequestError, ImageError) as error:
                response = JSONResponse({"detail": str(error)}, 400)
            except LlavaError as error:
                response = JSONResponse({"detail": str(error)}, 500)
            await response(scope, receive, send)


async def texts(first: lf.Delta, deltas: AsyncIterator[lf.Delta]) -> AsyncIterator[str]:
    yield first.text
    async for delta in deltas:
        yield delta.text


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="LLaVA directory or hub id")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(create_app(args.model), port=args.port)
