"""The images of a request: from data URIs or fetched, and checked before anything is decoded."""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import Any

from llava_fast.errors import ImageError
from llava_fast.processor.image import open_image
from llava_fast.serve.body import Threads
from llava_fast.serve.data_uri import decode_data_uri
from llava_fast.serve.problems import ApiError
from llava_fast.serve.settings import Settings

_OFF = "pictures are not fetched from the network here; send the picture itself, as a data: URI"


async def load_images(urls: list[str], settings: Settings, threads: Threads) -> list[bytes]:
    """The encoded images behind the urls of a request, in their order.

    Raises:
        ApiError: 400, which image and what is wrong with it.
    """
    if len(urls) > settings.max_images:
        message = f"{len(urls)} images are more than the {settings.max_images} that one request may have"
        raise ApiError(400, message, param="messages", code="too_many_images")

    async def load(number: int, url: str) -> bytes:
        try:
            if url[:5].lower() == "data:":
                return await threads.run(_decode, url, settings)
            data = await _fetch(url, settings)
            await threads.run(check_image, data, settings)
            return data
        except ImageError as error:
            message = f"image {number} of {len(urls)}: {error}"
            raise ApiError(400, message, param="messages", code="invalid_image") from None

    tasks = [asyncio.ensure_future(load(number, url)) for number, url in enumerate(urls, 1)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _decode(url: str, settings: Settings) -> bytes:
    data = decode_data_uri(url, settings.max_image_bytes)
    check_image(data, settings)
    return data


async def _fetch(url: str, settings: Settings) -> bytes:
    if settings.remote is None:
        raise ImageError(_OFF)
    from llava_fast.serve import remote

    return await remote.fetch(url, settings.remote)


def check_image(data: bytes, settings: Settings) -> None:
    """Judge an encoded image by its header.

    Raises:
        ImageError: too large, of a format that is not allowed, or made to be costly.
    """
    if len(data) > settings.max_image_bytes:
        raise ImageError(f"it has {len(data)} bytes, over the limit of {settings.max_image_bytes}")
    open_image(BytesIO(data), "the picture", settings.max_image_pixels, settings.image_formats).close()


def with_images(messages: list[dict[str, Any]], images: list[bytes]) -> list[dict[str, Any]]:
    """Messages whose image parts hold urls, with the images in their place."""
    left = iter(images)
    return [
        {**message, "content": [_with_image(part, left) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _with_image(part: dict[str, Any], left: Any) -> dict[str, Any]:
    return {"type": "image", "image": next(left)} if part["type"] == "image" else part
