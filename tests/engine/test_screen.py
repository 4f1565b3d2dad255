"""How far a logit can be from what the screen makes of it."""

import pytest
import torch

from llava_fast.engine.screen import Screen
from llava_kernels import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")


@pytest.mark.parametrize("width", [64, 700, 2048])
@pytest.mark.parametrize("outlier", [1, 300])
def test_no_logit_is_further_off_than_said(width, outlier):
    generator = torch.Generator().manual_seed(width)
    head = torch.randn(1500, width, generator=generator).bfloat16()  # in two parts
    head[::7, 3] *= outlier
    screen = Screen.of(head)
    hidden = torch.randn(4, width, generator=generator)
    hidden[1:3, 3] *= outlier
    found = library.Handle(2).linear(hidden, library.int8_weight(screen.weight))
    exact = hidden.double() @ head.double().T
    off = (found.double() - exact).abs() / hidden.double().norm(dim=1, keepdim=True)
    assert (off <= screen.error).all()
    assert (off.amax(0) >= screen.error / 100).double().mean() > 0.5  # and it is no bound that holds for anything
