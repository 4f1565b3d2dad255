"""Replicas of the server under Ray Serve: python examples/ray_serve.py [MODEL] [--replicas 2] [--port 8000]

Needs llava-fast[serve,ray]. API keys come from the environment variable LLAVA_FAST_API_KEYS. Each replica is an engine
with llava_fast.serve's app on it: the same routes, streaming, and an answer ends when its client goes away. Ray starts
replicas anew that fail, and lets them finish when they are told to go. It sends a request to the less busy of two, so
that a conversation does not always find its prefix; docs/scale-out.md has balancers that keep it in one place.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from llava_fast.engine import EngineConfig
from llava_fast.generate.setup import Setup
from llava_fast.pretrained import built_in, find_checkpoint
from llava_fast.serve import Settings, create_app
from llava_fast.serve.__main__ import keys_of


def application(setup: Setup, settings: Settings, replicas: int, num_gpus: float) -> serve.Application:
    def make_app() -> FastAPI:  # in the replica
        engine = setup.open("cuda:0" if num_gpus else "cpu")  # the card that Ray shows it
        app = create_app(engine, settings)
        app.state.engine = engine
        return app

    @serve.deployment(
        name="llava_fast",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": num_gpus},
        max_ongoing_requests=settings.max_concurrent,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    @serve.ingress(make_app)
    class Replica:
        app: Any  # what make_app made; Ray's wrapper has it

        def check_health(self) -> None:
            """Asked by Ray every ten seconds; a replica that raises is replaced."""
            if self.app.state.engine.failed is not None:
                raise RuntimeError("the engine has stopped")

    return Replica.bind()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model from several replicas under Ray Serve.")
    parser.add_argument("model", nargs="?", help="LLaVA directory, the same on every machine, or hub id")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--num-gpus", type=float, help="of each replica (default: one where the cluster has any)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--kv-cache-bytes", type=int, help="of each replica")
    args = parser.parse_args()

    ray.init(ignore_reinit_error=True)
    gpus = args.num_gpus if args.num_gpus is not None else int(bool(ray.cluster_resources().get("GPU")))
    setup = Setup(
        model=str(find_checkpoint(args.model) if args.model else built_in()),
        engine=EngineConfig(kv_cache_bytes=args.kv_cache_bytes),
    )
    serve.start(http_options={"host": args.host, "port": args.port})
    settings = Settings(api_keys=keys_of(None))
    with suppress(KeyboardInterrupt):
        serve.run(application(setup, settings, args.replicas, gpus), blocking=True)
    serve.shutdown()


if __name__ == "__main__":
    main()
