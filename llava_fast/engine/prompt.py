"""From a request to what the scheduler takes: token ids, images read and resized, and where each image's rows stand.

This runs outside the engine's thread, in the image pool or in the caller of ``submit``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llava_fast.engine.images import ImageReader, PreparedImage
from llava_fast.engine.request import Request
from llava_fast.errors import ImageError, InvalidRequestError, LlavaError, PromptTooLongError, RequestError
from llava_fast.processor import Processor
from llava_fast.processor.processor import Encoded


@dataclass
class Prompt:
    """Attributes: ids: (n,) int64; images: in order; starts: where the rows of each begin; rows: of one image."""

    ids: np.ndarray
    images: list[PreparedImage] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    rows: int = 0

    def images_within(self, first: int, last: int) -> list[tuple[PreparedImage, int]]:
        """The images with rows at positions first..last-1, each with the position of its first row."""
        pairs = zip(self.images, self.starts, strict=True)
        return [(image, start) for image, start in pairs if start < last and start + self.rows > first]

    def digests_within(self, first: int, last: int) -> tuple[bytes, ...]:
        return tuple(image.digest for image, _ in self.images_within(first, last)) if self.images else ()


def encode(request: Request, processor: Processor, *, vocab_size: int, max_length: int, max_images: int) -> Encoded:
    """Tokenize a request; no image is opened.

    Raises:
        InvalidRequestError: the request is malformed, or has more than ``max_images`` images.
        PromptTooLongError: no room for an answer within ``max_length`` tokens.
    """
    if (request.messages is None) == (request.token_ids is None):
        raise InvalidRequestError("a request needs messages or token_ids, and not both")
    if request.messages is not None and len(request.images):
        raise InvalidRequestError("images= belongs to token_ids; put the images into the messages, as parts of them")
    try:
        if request.messages is not None:
            _count_images(request, max_images)
            encoded = processor.prompt(request.messages)
        else:
            assert request.token_ids is not None
            encoded = processor.prompt_of_ids(request.token_ids, list(request.images))
    except RequestError:
        raise
    except LlavaError as error:
        raise InvalidRequestError(str(error)) from error
    if len(encoded.images) > max_images:
        raise InvalidRequestError(f"{len(encoded.images)} images are more than max_images={max_images}; send fewer")
    ids = encoded.input_ids
    if not len(ids):
        raise InvalidRequestError("the prompt is empty; give it at least one token")
    outside = ids[(ids != processor.image_token_id) & ((ids < 0) | (ids >= vocab_size))]
    if len(outside):
        raise InvalidRequestError(f"token id {outside[0]} is outside the model's vocabulary of {vocab_size}")
    if len(ids) >= max_length:
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens, {len(encoded.images) * processor.tokens_per_image} of them image rows, "
            f"and max_length={max_length} leaves no room for an answer; shorten it or send fewer images"
        )
    return encoded


def _count_images(request: Request, max_images: int) -> None:
    """Refuse too many images before any work is done for them."""
    assert request.messages is not None
    contents = [m.get("content") for m in request.messages if isinstance(m, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = sum(isinstance(part, dict) and part.get("type") == "image" for part in parts)
    if images > max_images:
        raise InvalidRequestError(f"{images} images are more than max_images={max_images}; send fewer")


def prepare(encoded: Encoded, processor: Processor, reader: ImageReader, salt: str) -> Prompt:
    """Read and resize the images of ``encoded``.

    Raises:
        ImageError: an image cannot be used; says which.
    """
    ids = encoded.input_ids
    if not encoded.images:
        return Prompt(ids)
    images = []
    for number, source in enumerate(encoded.images, 1):
        try:
            images.append(reader.read(source, salt))
        except ImageError as error:
            raise ImageError(f"image {number} of {len(encoded.images)}: {error}") from error
    rows = processor.tokens_per_image
    starts = np.flatnonzero(ids == processor.image_token_id)[::rows].tolist()
    return Prompt(ids, images, starts, rows)
