"""python -m llava_fast.serve: an OpenAI-compatible server and a chat page."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from llava_fast.engine import EngineConfig
from llava_fast.errors import ConfigError, LlavaError
from llava_fast.generate.options import BUDGETS, add_fields
from llava_fast.generate.setup import Setup
from llava_fast.model.quantized import KINDS
from llava_fast.pretrained import built_in, find_checkpoint
from llava_fast.serve.settings import Moderate, Settings

KEYS = "LLAVA_FAST_API_KEYS"
EPILOG = f"""\
API keys, any of which opens every route but /health, come from --api-key-file (one a line) or from the environment
variable {KEYS} (separated by commas). Without one everybody who can reach the port may use the server.
A browser that opens the chat page asks for a name, which may be any, and a password, which is the key.

SIGTERM or Ctrl-C: new requests get 503 with Retry-After, running ones are finished; a second one ends at once.
"""
LIMITS = {
    "max_body_bytes": "bytes of a request",
    "max_total_bytes": "bytes of all requests together",
    "max_images": "images of a request",
    "max_image_bytes": "bytes of an image",
    "max_image_pixels": "pixels of an image",
    "max_n": "answers to a prompt",
    "max_answers": "answers to all prompts of a request",
    "max_tokens": "tokens of an answer; by default the model's context",
    "max_concurrent": "requests at a time; more are refused with 503",
    "request_seconds": "for a request and its answer",
    "head_seconds": "for the head of a request to arrive",
    "body_seconds": "for the body to arrive",
    "send_seconds": "for a client to take what was sent",
    "event_seconds": "between two events of a stream at least; 0: a token, an event",
    "drain_seconds": "for running requests after SIGTERM",
    "allow_priority": "let clients set a priority",
}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'llava-fast[serve]'", file=sys.stderr)
        return 2
    try:
        return run(args)
    except (LlavaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {str(error).splitlines()[0]}; lower --kv-cache-bytes", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from llava_fast.serve.server import serve

    settings = settings_of(args)
    check_listening(args.host, args.port)
    budgets = {name: getattr(args, name) for name in BUDGETS if getattr(args, name) is not None}
    setup = Setup(
        model=str(find_checkpoint(args.model)) if args.model else str(built_in()),
        dtype=args.dtype,
        quantization=args.quantization,
        engine=EngineConfig(**{"max_images": settings.max_images, **budgets}),
    )
    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if not settings.api_keys and args.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: no API key is set, and {args.host} may be reached by others", file=sys.stderr)
    print(f"loading {setup.model} onto {device}", file=sys.stderr)
    with setup.open(device) as engine:
        return serve(engine, settings, host=args.host, port=args.port, access_log=args.access_log)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.serve",
        description="Serve a model: OpenAI's API at /v1, a chat page at /.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="LLaVA directory or hub id (default: the small built-in one)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (default %(default)s)")
    parser.add_argument("--model-name", help="what clients call the model (default: the directory's name)")
    parser.add_argument("--api-key-file", type=Path, help="file of API keys, one a line")
    parser.add_argument(
        "--access-log", action=argparse.BooleanOptionalAction, default=True, help="a line of JSON a request, on stderr"
    )
    parser.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="whose pages may call")
    parser.add_argument("--log-conversations", type=Path, metavar="PATH", help="append conversations there, as JSONL")
    parser.add_argument(
        "--moderate", metavar="MODULE:FUNCTION", help="async function of messages: None, or why they are refused"
    )
    images = parser.add_argument_group("images at http(s) addresses", "none are fetched unless allowed here")
    images.add_argument("--remote-images", action="store_true", help="from every host with public addresses")
    images.add_argument("--remote-host", action="append", default=[], metavar="HOST", help="from this one")
    images.add_argument(
        "--remote-private-host", action="append", default=[], metavar="HOST", help="from this one, even if it is inside"
    )
    add_fields(parser.add_argument_group("limits"), Settings, LIMITS)
    machine = parser.add_argument_group("model and machine")
    machine.add_argument("--device", help="such as cuda:1 (default: the first CUDA device, else cpu)")
    machine.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on cuda, float32 on a cpu"
    )
    machine.add_argument("--quantization", choices=KINDS, help="round the decoder's weights as they are read")
    budgets = {name: text for name, text in BUDGETS.items() if name != "max_images"}
    add_fields(parser.add_argument_group("engine"), EngineConfig, budgets)
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ConfigError or OSError for what cannot work."""
    limits: dict[str, Any] = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    named = Path(args.model).name if args.model else "llava-fast-built-in"
    if args.remote_images or args.remote_host or args.remote_private_host:
        from llava_fast.serve.remote import RemotePolicy

        limits["remote"] = RemotePolicy(
            allow="public" if args.remote_images else "none",
            hosts=tuple(args.remote_host),
            private_hosts=tuple(args.remote_private_host),
            max_bytes=limits.get("max_image_bytes", Settings.max_image_bytes),
        )
    return Settings(
        model_name=args.model_name or named or "llava-fast",
        api_keys=keys_of(args.api_key_file),
        cors_origins=tuple(args.cors_origin),
        conversations=args.log_conversations,
        moderate=hook_of(args.moderate) if args.moderate else None,
        **limits,
    )


def check_listening(host: str, port: int) -> None:
    """Raises ConfigError where nothing could listen, before a model is loaded for it."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is not between 0 and 65535")
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        cure = "choose another --port" if error.errno == errno.EADDRINUSE else "choose another --host"
        raise ConfigError(f"cannot listen on {host} port {port} ({error.strerror}); {cure}") from error


def keys_of(path: Path | None) -> tuple[str, ...]:
    """The keys of a file and of the environment. Raises ConfigError for a file without any."""
    found = [key.strip() for key in os.environ.get(KEYS, "").split(",")]
    if path is not None:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ConfigError(f"--api-key-file {path} holds no key; write one a line")
        found += lines
    return tuple(key for key in found if key)


def hook_of(name: str) -> Moderate:
    """The function that ``module:function`` names. Raises ConfigError."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--moderate {json.dumps(name)}: {error}; write it as package.module:function") from error
    return found


if __name__ == "__main__":
    sys.exit(main())
