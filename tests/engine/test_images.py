"""One picture has one name, whatever it comes as; what is hashed is what is resized."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from llava_fast.engine.images import FeatureCache, ImageReader
from llava_fast.errors import ImageError
from llava_fast.processor.image import ImageProcessor

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


@pytest.fixture
def reader() -> ImageReader:
    return ImageReader(ImageProcessor(24, max_pixels=2000), FeatureCache(1 << 20))


def test_one_name_whatever_it_comes_as(reader):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, ::2] = PIXELS
    same = [PIXELS, wide[:, ::2], Image.fromarray(PIXELS), file.getvalue(), torch.from_numpy(PIXELS.copy())]
    read = [reader.read(source, "") for source in same]
    assert len({image.digest for image in read}) == 1
    assert all(torch.equal(image.pixels, read[0].pixels) for image in read)
    others = [PIXELS.reshape(30, 40, 3), PIXELS[:, :, ::-1], PIXELS[:, :, 0]]
    names = {reader.read(source, "").digest for source in others} | {reader.read(PIXELS, "tenant").digest}
    assert len(names | {read[0].digest}) == 5


def test_an_array_that_changes_while_it_is_read(reader, monkeypatch):
    """As a camera's buffer does: the name and the pixels are of one moment."""
    frame, expected = PIXELS.copy(), reader.read(PIXELS, "")
    resize = reader.processor
    monkeypatch.setattr(reader, "processor", lambda picture: frame.fill(0) or resize(picture))
    found = reader.read(frame, "")
    assert found.digest == expected.digest and torch.equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("source", [np.zeros((100, 100, 3), np.uint8), np.zeros((0, 5, 3), np.uint8)])
def test_arrays_are_judged(source, reader):
    with pytest.raises(ImageError, match="pixels"):
        reader.read(source, "")
