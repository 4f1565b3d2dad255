"""The network on packed tokens: vision tower, projector, decoder, and LLaVA, which joins them."""

from llava_fast.model.llava import Llava

__all__ = ["Llava"]
