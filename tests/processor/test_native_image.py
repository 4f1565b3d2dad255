"""Pictures through the C library against the same through PIL: equal to the bit, or the same error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from llava_fast.errors import ImageError
from llava_fast.processor.image import ImageProcessor
from llava_kernels import image as native
from llava_kernels import implementation, library
from llava_kernels.image import Placement

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")
aspects = pytest.mark.parametrize("aspect", ["square", "pad"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Placement]:
    """What the library was asked for."""
    seen = []
    prepare = native.prepare

    def noted(pixels, out, placement, *rest):
        seen.append(placement)
        prepare(pixels, out, placement, *rest)

    monkeypatch.setattr(native, "prepare", noted)
    return seen


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Every other picture black and white, the hardest for a filter that rounds between its passes and clips."""
    random = np.random.default_rng(seed)
    if seed % 2:
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return random.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


def by_pil(processor: ImageProcessor, source, *out) -> torch.Tensor:
    with implementation("reference"):
        return processor(source, *out)


SHAPES = [
    *[(1, 1), (1, 7), (7, 1), (2, 3), (16, 16), (48, 48), (48, 64), (64, 48), (97, 101), (101, 97), (335, 337)],
    *[(240, 320), (640, 480), (300, 900), (150, 149), (149, 150), (1, 200), (200, 1), (1000, 7), (7, 1000)],
]
TALL = [(300, 101), (900, 300), (500, 240), (150, 60)]  # to 48 pixels: PIL from 13 on resizes them in height first


@aspects
@pytest.mark.parametrize("size", [1, 16, 31, 48, 112])
def test_same_bits(size: int, aspect: str, calls: list[Placement]):
    processor = ImageProcessor(size, aspect)
    for seed, shape in enumerate(SHAPES + TALL):
        array = noise(*shape, seed)
        expected = by_pil(processor, array)
        assert calls == []
        assert torch.equal(processor(array), expected), shape
        assert torch.equal(processor(Image.fromarray(array)), expected), shape
        assert len(calls) == 2
        calls.clear()


@aspects
def test_same_bits_of_any_shape(aspect: str, calls: list[Placement]):
    random = np.random.default_rng(7)
    for seed in range(300):
        size, height, width = (int(n) for n in random.integers(1, 130, 3))
        processor, array = ImageProcessor(size, aspect, (0.1, 0.5, 0.9), (0.7, 0.2, 0.4)), noise(height, width, seed)
        assert torch.equal(processor(array), by_pil(processor, array)), (size, height, width)
    assert len(calls) == 300


def test_pictures_that_lose_most_in_height(calls: list[Placement]):
    processor = ImageProcessor(48)
    for shape in TALL:
        processor(noise(*shape))
    expected = int(Image.__version__.split(".")[0]) >= 13
    assert [placement.height_first for placement in calls] == [expected] * len(TALL)


@aspects
def test_elongated_pictures_stay_with_pil(aspect: str, calls: list[Placement]):
    processor = ImageProcessor(336, aspect)
    for shape in ((50, 4000), (4000, 50)):
        array = noise(*shape)
        assert torch.equal(processor(array), by_pil(processor, array))
    assert calls == []


@aspects
def test_arrays_of_any_layout(aspect: str, calls: list[Placement]):
    processor, array = ImageProcessor(24, aspect), noise(60, 80, 1)
    layouts = [array[::-1], array[:, ::-1], array[::2, ::3], array[5:50, 7:70], array[:, :, ::-1], array[::-3, 4:9]]
    layouts += [array.transpose(1, 0, 2), np.asfortranarray(array), np.broadcast_to(array[:1], (30, 80, 3)), array[:1]]
    layouts += [np.lib.stride_tricks.as_strided(array, (1, 9, 3), (5, 3, 1)), array[:, :1], array[:, ::7][:, :1]]
    for view in layouts:
        kept = view.copy()
        assert torch.equal(processor(view), by_pil(processor, kept)), (view.shape, view.strides)
        assert np.array_equal(view, kept)
    frozen = array.copy()
    frozen.flags.writeable = False
    assert torch.equal(processor(frozen), processor(array))
    assert len(calls) == len(layouts) + 2


def test_every_instruction_set():
    array, placement = noise(67, 90, 1), Placement((90, 91), (11, 1), (29, 41), (3, 5), height_first=True)
    found = []
    for name in (*library.INSTRUCTIONS, None):
        out = torch.full((3, 23, 23), torch.nan)
        try:
            native.prepare(array, out, placement, (1, 2, 3), (0.1, 0.2, 0.3), (3, 2, 1), name)
        except library.LibraryError:
            continue
        found.append(out)
    assert len(found) >= 2 and all(torch.equal(out, found[0]) for out in found)


@aspects
def test_tensors_to_write_into(aspect: str, calls: list[Placement]):
    processor, array = ImageProcessor(20, aspect), noise(50, 33)
    expected = by_pil(processor, array)
    batch = torch.zeros(3, 3, 20, 20)
    assert processor(array, batch[1]) is not batch and torch.equal(batch[1], expected)
    assert not batch[0].any() and not batch[2].any() and len(calls) == 1
    last = torch.zeros(20, 20, 3).permute(2, 0, 1)  # channels last: numpy writes it
    assert torch.equal(processor(array, last), expected) and len(calls) == 1


@pytest.mark.parametrize(
    "out", [torch.zeros(3, 20, 19), torch.zeros(3, 20, 20, dtype=torch.int32), torch.zeros(3, 20, 20).requires_grad_()]
)
def test_tensors_that_cannot_be_written(out: torch.Tensor, calls: list[Placement]):
    processor, array = ImageProcessor(20), noise(50, 33)
    with pytest.raises(Exception) as expected:
        by_pil(processor, array, out)
    with pytest.raises(expected.type) as found:
        processor(array, out)
    assert str(found.value) == str(expected.value) and calls == []


@aspects
@pytest.mark.parametrize(
    "source",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0, 3), np.uint8),
        np.zeros((50, 41, 3), np.uint8),
        np.zeros((5, 5, 3), np.int8),
        Image.new("RGB", (41, 50)),
        b"no picture",
    ],
)
def test_same_errors(source, aspect: str, calls: list[Placement]):
    processor = ImageProcessor(20, aspect, max_pixels=2000)
    with pytest.raises(ImageError) as expected:
        by_pil(processor, source)
    with pytest.raises(ImageError) as found:
        processor(source)
    assert str(found.value) == str(expected.value) and calls == []


def test_impossible_placements():
    array, out = noise(6, 8), torch.zeros(3, 4, 4)
    for placement in (
        Placement((6, 7), (0, 0), (4, 4), (0, 0)),  # a canvas below the picture
        Placement((6, 8), (1, 0), (4, 4), (0, 0)),
        Placement((6, 8), (0, 0), (4, 4), (0, 1)),
        Placement((6, 8), (0, 0), (3, 4), (0, 0)),
    ):
        with pytest.raises(library.LibraryError, match=r"\(3, 4, 4\).*\(6, 8, 3\).*invalid argument"):
            native.prepare(array, out, placement, (0, 0, 0), (1, 1, 1), (0, 0, 0))
    assert not out.any()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch):
    processor, array = ImageProcessor(20, "pad"), noise(50, 33)
    expected = processor(array)
    monkeypatch.setattr(native, "load", lambda: None)
    assert torch.equal(processor(array), expected)


@aspects
def test_many_threads_at_once(aspect: str):
    processor = ImageProcessor(40, aspect)
    pictures = [noise(60 + 3 * i, 90 - 2 * i, i) for i in range(16)]
    expected = [by_pil(processor, picture) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(processor, pictures), expected, strict=True):
                assert torch.equal(found, right)
