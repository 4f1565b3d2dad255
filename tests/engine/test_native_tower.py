"""The vision tower through the C library beside the model's own modules."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import llava_fast as lf
from llava_fast.engine.native_tower import WIDEST_FLOAT32, NativeTower
from llava_kernels import implementation, library

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")


def model(dtype: torch.dtype = torch.float32, **vision) -> lf.Llava:
    config = lf.ModelConfig.preset("tiny")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **vision))
    made = lf.Llava(config, seed=3).requires_grad_(False)
    with torch.no_grad():  # norms and biases are not all ones and zeros
        for parameter in made.vision_tower.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.05)
    return made.to(dtype)


def pixels(of: lf.Llava, images: int) -> torch.Tensor:
    side = of.config.vision.image_size
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(5))


def instructions() -> list[str]:
    found = []
    for name in library.INSTRUCTIONS:
        try:
            found.append(library.Handle(1, name).instructions)
        except library.LibraryError:
            continue
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", instructions())
@torch.inference_mode()
def test_float32(name, threads):
    of = model()
    tower = NativeTower(of, library.Handle(threads, name))
    for images in (1, 3, 0):
        found = tower(pixels(of, images))
        torch.testing.assert_close(found, of.image_features(pixels(of, images)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", instructions())
@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_torch(name):
    of = model(torch.bfloat16)
    exact = model(torch.bfloat16).float().image_features(pixels(of, 4).bfloat16().float())
    ours = NativeTower(of, library.Handle(2, name))(pixels(of, 4))
    assert ours.dtype == torch.bfloat16
    torchs = of.image_features(pixels(of, 4))
    assert (ours - exact).norm() <= (torchs - exact).norm()


@torch.inference_mode()
def test_more_rows_than_go_at_once():
    """Many images are run some at a time, and each is the same whatever else is there."""
    of = model(image_size=112, patch_size=4)  # 785 tokens an image
    tower = NativeTower(of, library.Handle(2))
    together = tower(pixels(of, 5))
    torch.testing.assert_close(together, of.image_features(pixels(of, 5)), atol=2e-5, rtol=2e-5)
    assert torch.equal(together[4:], tower(pixels(of, 5)[4:]))


def test_where_it_fits():
    of = model()
    handle = library.Handle()
    assert NativeTower.misfit(of, handle) is None
    assert "gelu" in str(NativeTower.misfit(model(hidden_act="gelu"), handle))
    with implementation("reference"):
        assert "reference" in str(NativeTower.misfit(of, handle))
    wide = model(hidden_size=2 * WIDEST_FLOAT32)
    assert "faster" in str(NativeTower.misfit(wide, handle))
    assert "float16" in str(NativeTower.misfit(of.half(), handle))


def test_a_weight_that_does_not_fit_is_refused():
    of = model()
    tower = NativeTower(of, library.Handle())
    tower.args.heads = 3
    with pytest.raises(library.LibraryError, match="3 heads in a width of 128"):
        tower(pixels(of, 1))
    tower.args.heads, tower.args.layer[0].fc1.in_features = 4, 64
    with pytest.raises(library.LibraryError, match=r"fc1 is \(384, 64\), not \(384, 128\)"):
        tower(pixels(of, 1))
