"""Images on their way in: identity, pixels, and a cache of the vision tower's features.

What is kept is Z_v, the features before the projector: the splice projects while it stores, and for LLaVA-7B they are
a quarter of the bytes of H_v.
"""

from __future__ import annotations

import hmac
import os
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np
from torch import Tensor

from llava_fast.processor.image import ImageProcessor, ImageSource, is_rgb, load_image


@dataclass
class PreparedImage:
    """An image as the runner takes it. One of ``pixels`` and ``features`` is there.

    Attributes:
        digest: 32 bytes, equal for equal pictures under the same preprocessing and salt, within one engine.
        pixels: (3, S, S) float32 on the host.
        features: Z_v (tokens_per_image, C) on the model's device.
    """

    digest: bytes
    pixels: Tensor | None = None
    features: Tensor | None = None


class FeatureCache:
    """Features of images seen before, least recently used out first. Safe to use from several threads."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = Lock()

    def get(self, digest: bytes, count: bool = True) -> Tensor | None:
        with self._lock:
            features = self._features.get(digest)
            if features is not None:
                self._features.move_to_end(digest)
            if count:
                self.hits += features is not None
                self.misses += features is None
            return features

    def put(self, digest: bytes, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        with self._lock:
            if size > self.max_bytes or digest in self._features:
                return
            self._features[digest] = features
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, oldest = self._features.popitem(last=False)
                self.num_bytes -= oldest.numel() * oldest.element_size()

    def clear(self) -> None:
        with self._lock:
            self._features.clear()
            self.num_bytes = 0


class ImageReader:
    """Reads images, tells equal ones by a keyed hash, and resizes those whose features are not in the cache."""

    def __init__(self, processor: ImageProcessor, cache: FeatureCache):
        self.processor = processor
        self.cache = cache
        self._key = os.urandom(32)  # nobody outside can make two pictures of one digest
        recipe = (processor.size, processor.aspect, processor.mean, processor.std)
        self._preprocessing = repr(recipe).encode()

    def read(self, source: ImageSource, salt: str) -> PreparedImage:
        """Raises ImageError where the source cannot be used."""
        if is_rgb(source):
            pixels = np.array(source, order="C")  # whose owner may write the next frame into it
        else:
            pixels = np.asarray(load_image(source, self.processor.max_pixels))
        digest = hmac.new(self._key, digestmod="sha256")  # processors have instructions for it
        for part in (salt.encode(), self._preprocessing, f"RGB {pixels.shape[1]} {pixels.shape[0]}".encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
        digest.update(pixels.data)
        name = digest.digest()
        features = self.cache.get(name)
        if features is not None:
            return PreparedImage(name, features=features)
        return PreparedImage(name, pixels=self.processor(pixels))
