"""The server that test_attacks.py attacks, in a process of its own: python -m tests.serve.attacked MODEL KEY

Limits are small, so that attacks on them are short. The port is the first line of its output.
"""

from __future__ import annotations

import asyncio
import sys

import torch
import uvicorn

import llava_fast as lf
from llava_fast.serve import Settings, create_app
from llava_fast.serve.remote import RemotePolicy
from llava_fast.serve.slow_clients import limited

SECONDS = 2.0  # for a head, a body, and for taking what was sent
MAX_BODY = 4 << 20
MAX_PIXELS = 1_000_000
MAX_IMAGES = 8


async def serve(model: str, key: str) -> None:
    settings = Settings(
        api_keys=(key,),
        max_body_bytes=MAX_BODY,
        max_images=MAX_IMAGES,
        max_image_pixels=MAX_PIXELS,
        remote=RemotePolicy(allow="public", timeout=2),
        body_seconds=SECONDS,
        send_seconds=SECONDS,
    )
    with lf.Engine(*lf.load(model), lf.EngineConfig(kv_cache_bytes=1 << 24, max_sequences=16)) as engine:
        config = uvicorn.Config(
            create_app(engine, settings), port=0, log_level="warning", http=limited(SECONDS, SECONDS), ws="none"
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(serve(*sys.argv[1:]))
