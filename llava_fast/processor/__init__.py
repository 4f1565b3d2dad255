"""Processor: images to pixels, conversations to tokens."""

from typing import TYPE_CHECKING

from llava_fast.lazy import exporter

if TYPE_CHECKING:
    from llava_fast.processor.image import ImageProcessor, load_image
    from llava_fast.processor.processor import Encoded, Processor
    from llava_fast.processor.tokenizer import Tokenizer
else:  # a type checker would take every name for one of these
    __getattr__ = exporter(
        __name__,
        {
            "ImageProcessor": "llava_fast.processor.image",
            "load_image": "llava_fast.processor.image",
            "Encoded": "llava_fast.processor.processor",
            "Processor": "llava_fast.processor.processor",
            "Tokenizer": "llava_fast.processor.tokenizer",
        },
    )

__all__ = ["Encoded", "ImageProcessor", "Processor", "Tokenizer", "load_image"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
