"""Settings: what a server allows. Every default is meant to be safe on a public address, but for the missing key."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.processor.image import FORMATS
from llava_fast.serve.remote import RemotePolicy

Moderate = Callable[[list[dict[str, Any]]], Awaitable[str | None]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one app serves and how much a client may ask of it.

    Attributes:
        model_name: what clients call the model.
        api_keys: any of them opens every route; without one every route is open. ``/health`` always is.
        max_body_bytes: of one request. Refused while it is read.
        max_total_bytes: of the bodies of all requests that are being read or answered.
        max_values: brackets, commas and colons in a body: what its parsed form takes in memory follows from them.
        max_images, max_image_bytes, max_image_pixels: images of a request, encoded bytes and pixels of each.
        image_formats: PIL's names.
        remote: which http(s) images are fetched; None for none.
        max_n: answers to one prompt; ``max_prompts`` prompts of one completions request; ``max_answers`` answers to all
            of them.
        max_tokens: of one answer; None for what the context holds.
        max_concurrent: requests that are worked on; more are refused with 503.
        request_seconds: from a request's first byte to the end of its answer.
        head_seconds: for the head of a request to arrive; the command line's server keeps it, an app cannot.
        body_seconds: for the whole body to arrive; send_seconds: for a client to take what was sent.
        event_seconds: at least so long between two events of a stream, each with all that is new; the first comes at
            once, and so does the end. With more than eight requests it is longer, up to a tenth of a second, so that
            the work of sending does not grow with them. 0 for an event as soon as there is anything: at thousands of
            tokens a second what sends them then takes more of the processor than what makes them.
        drain_seconds: for running requests to end after SIGTERM.
        health_seconds: within which ``/health`` answers; its verdict is good for ``health_age_seconds``.
        allow_priority: let clients say which request comes first.
        cors_origins: origins whose pages may call this server; ("*",) for all.
        conversations: JSONL file to which every conversation is appended, images as hashes; None for none.
        moderate: called with a request's messages (texts; images as bytes) before it begins; returns why it is refused,
            or None. A hook that raises refuses.

    Raises:
        ConfigError: on construction, a value that cannot work.
    """

    model_name: str = "llava-fast"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 32 << 20
    max_total_bytes: int = 512 << 20
    max_values: int = 200_000
    max_images: int = 16
    max_image_bytes: int = 16 << 20
    max_image_pixels: int = 40_000_000
    image_formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF")
    remote: RemotePolicy | None = None
    max_n: int = 16
    max_prompts: int = 64
    max_answers: int = 128
    max_tokens: int | None = None
    max_concurrent: int = 256
    request_seconds: float = 300.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    event_seconds: float = 0.02
    drain_seconds: float = 60.0
    health_seconds: float = 10.0
    health_age_seconds: float = 1.0
    allow_priority: bool = False
    cors_origins: tuple[str, ...] = ()
    conversations: Path | None = None
    moderate: Moderate | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            least = 0 if one.name in ("max_images", "event_seconds", "drain_seconds", "health_age_seconds") else 1e-3
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not least <= value < math.inf:
                raise ConfigError(f"{one.name}={value} must be above 0 and finite")
        unknown = [name for name in self.image_formats if name not in FORMATS]
        if unknown or not self.image_formats:
            raise ConfigError(f"image_formats={self.image_formats} must be some of {', '.join(FORMATS)}")
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ConfigError(
                "an API key is shorter than 8 characters or not printable ASCII; take a longer random one"
            )
