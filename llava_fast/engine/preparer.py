"""Preparer: tokenizes requests where they are submitted and reads their images in a pool of threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from llava_fast.engine.config import EngineConfig
from llava_fast.engine.images import ImageReader
from llava_fast.engine.prompt import Prompt, encode, prepare
from llava_fast.engine.request import Request
from llava_fast.errors import InvalidRequestError, LlavaError
from llava_fast.processor import Processor
from llava_fast.processor.processor import Encoded

Done = Callable[[Prompt | Exception], None]


class Preparer:
    """Args:
    processor, reader: the model's.
    config: limits.
    vocab_size: rows of the embedding table.
    max_length: tokens of prompt and answer that fit.
    workers: threads; with 0 the images are read where the request is submitted.
    """

    def __init__(
        self,
        processor: Processor,
        reader: ImageReader,
        config: EngineConfig,
        *,
        vocab_size: int,
        max_length: int,
        workers: int,
    ):
        self._processor, self._reader, self._config = processor, reader, config
        self._vocab_size, self._max_length = vocab_size, max_length
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="llava_fast.images") if workers else None

    def start(self, request: Request, done: Done, wanted: Callable[[], bool]) -> None:
        """Prepare a request and call ``done``, from here or from a thread of the pool, with its prompt or with the
        typed error that it failed with. Images are not read once ``wanted`` says no."""
        try:
            encoded = self._encode(request)
        except Exception as error:  # whatever a malformed request leads to is that request's own
            done(_typed(error))
            return
        if self._pool is None or not encoded.images:
            self._read(request, encoded, done, wanted)
            return
        try:
            self._pool.submit(self._read, request, encoded, done, wanted)
        except RuntimeError:  # the pool was shut down: whoever did so fails the request
            return

    def _encode(self, request: Request) -> Encoded:
        sampling, limit = request.sampling, self._config.max_n
        if sampling.n > limit:
            raise InvalidRequestError(f"n={sampling.n} is above max_n={limit}; ask for fewer answers")
        for token in (*sampling.logit_bias, *sampling.stop_token_ids):
            if not 0 <= token < self._vocab_size:
                raise InvalidRequestError(f"token id {token} is outside the model's vocabulary of {self._vocab_size}")
        return encode(
            request,
            self._processor,
            vocab_size=self._vocab_size,
            max_length=self._max_length,
            max_images=self._config.max_images,
        )

    def _read(self, request: Request, encoded: Encoded, done: Done, wanted: Callable[[], bool]) -> None:
        if not wanted():
            return
        try:
            done(prepare(encoded, self._processor, self._reader, request.cache_salt))
        except Exception as error:
            done(_typed(error))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _typed(error: Exception) -> Exception:
    """The error as its reader gets it: ours as it is, anything else as a request that could not be understood."""
    if isinstance(error, LlavaError):
        return error
    wrapped = InvalidRequestError(f"the request cannot be understood: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
