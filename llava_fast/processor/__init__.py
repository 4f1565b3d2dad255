"""Processor: images to pixels, conversations to tokens."""

from llava_fast.processor.image import ImageProcessor, load_image
from llava_fast.processor.processor import Encoded, Processor
from llava_fast.processor.tokenizer import Tokenizer

__all__ = ["Encoded", "ImageProcessor", "Processor", "Tokenizer", "load_image"]
