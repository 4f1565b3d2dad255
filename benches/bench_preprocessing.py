"""A photograph to the vision tower's input, and a conversation to tokens and labels, beside transformers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_fast.processor import ImageProcessor
from llava_kernels import implementation, library

SIZES = [(640, 480), (336, 448), (500, 375), (1024, 683)]


def photographs() -> list[bytes]:
    """JPEG files of smooth noise: they decode and resize like photographs of these sizes."""
    random = np.random.default_rng(0)
    files = []
    for width, height in SIZES:
        small = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def ours() -> object:
    process = ImageProcessor(336, "square")
    return lambda files: torch.stack([process(file) for file in files])


def transformers() -> object:
    process = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return lambda files: (
        process([Image.open(io.BytesIO(f)).convert("RGB") for f in files], return_tensors="pt").pixel_values
    )


@pytest.mark.parametrize("impl", ["ours", "transformers"])
def test_images(benchmark, impl):
    files = photographs()
    run = {"ours": ours, "transformers": transformers}[impl]()
    grey = 1 / 255 / 0.26  # one grey level after normalisation
    torch.testing.assert_close(ours()(files), transformers()(files), atol=1.05 * grey, rtol=0)
    benchmark.group = "images, JPEG to 336 x 336 tensors"
    benchmark(run, files)
    if benchmark.stats is not None:
        benchmark.extra_info |= {"shape": str(SIZES), "images_per_s": len(files) / benchmark.stats.stats.median}


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize(("shape", "size"), [((240, 320), 48), ((480, 640), 336), ((3000, 4000), 336)])
@pytest.mark.parametrize("impl", ["library", "pil"])
def test_resize(benchmark, impl, shape, size, aspect):
    """Decoded pixels (H, W, 3) to a tensor, by the C library or by PIL and numpy: the same bits."""
    if impl == "library" and library.load() is None:
        pytest.skip("libllava_kernels was not built")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    process, out = ImageProcessor(size, aspect), torch.empty(3, size, size)
    with implementation("reference"):
        expected = process(pixels)
    benchmark.group = f"{shape[1]}x{shape[0]} to {size}x{size}, {aspect}"
    with implementation("auto" if impl == "library" else "reference"):
        benchmark(process, pixels, out)
    assert torch.equal(out, expected)
