"""Training products in float8: a frozen decoder's through our own kernels, a trained one's through torchao."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_fast.errors import ConfigError
from llava_fast.model.decoder import projections
from llava_kernels import FrozenWeight, freeze_fp8, frozen_linear

if TYPE_CHECKING:
    from llava_fast.model.linear import Linear
    from llava_fast.model.llava import Llava


class Fp8Linear(nn.Module):
    """``x @ W.T`` with a frozen W in float8; x and the gradients that pass through are rounded to it too.

    Args:
        weight: (N, K), both multiples of 16.
    """

    codes: Tensor  # (N, K) float8
    transposed: Tensor  # (K, N), the same
    scale: Tensor  # (N,) float32

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        frozen = freeze_fp8(weight)
        for name in ("codes", "transposed", "scale"):
            self.register_buffer(name, getattr(frozen, name), persistent=False)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, K) -> (T, N)."""
        return frozen_linear(x, FrozenWeight(self.codes, self.transposed, self.scale))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, float8"


def check_frozen(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ConfigError, in one line, where a frozen decoder's products cannot run in float8.

    On a CPU they run, slowly, with the same rounding: to try a run out.
    """
    if device.type == "cuda":
        _check_card(device, dtype, "--fp8-frozen")


def check_trained(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ConfigError, in one line, where a trained decoder's products cannot run in float8."""
    if device.type != "cuda":
        raise ConfigError(
            f"--fp8 needs a CUDA device with float8 products, and this run is on {device.type}; leave it out"
        )
    _check_card(device, dtype, "--fp8")
    _torchao_float8()


def _check_card(device: torch.device, dtype: torch.dtype, option: str) -> None:
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"{option} needs float8 products (H100, H200, L40S; sm_89 and later), and this run is on "
            f"{torch.cuda.get_device_name(device)}; leave it out"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(f"{option} needs --dtype bfloat16, and this run computes in {dtype}")


def freeze_decoder(model: Llava) -> None:
    """Round the products of the decoder's layers to float8, in place, one after another.

    Embeddings, norms, head, projector and tower stay as they are. The decoder cannot be trained or saved afterwards.

    Raises:
        ConfigError: a size is no multiple of 16.
    """
    for layer in model.decoder.layers:
        for product in projections(model.config.text):
            try:
                setattr(layer, product, Fp8Linear(getattr(layer, product).weight))
            except ValueError as error:
                raise ConfigError(f"--fp8-frozen: {product}: {error}") from None


def train_decoder(model: Llava, *, emulate: bool = False) -> None:
    """Turn the products of the decoder's layers into torchao's ``Float8Linear``, in place, with the same parameters.

    Inputs, weights and gradients are rounded to e4m3 with a scale a row for each of the three products of a step. The
    number of tokens, over which the weight's gradient sums, is padded to a multiple of 16.

    Args:
        emulate: multiply in float32 what was rounded; for devices without float8 products.

    Raises:
        ConfigError: torchao is not installed.
    """
    float8 = _torchao_float8()
    config = float8.Float8LinearConfig.from_recipe_name("rowwise")
    config = replace(config, pad_inner_dim=True, emulate=emulate)

    def products(module: Linear, name: str) -> bool:
        return name.split(".")[-1] in projections(model.config.text)

    float8.convert_to_float8_training(model.decoder.layers, config=config, module_filter_fn=products)


def _torchao_float8() -> Any:
    try:
        import torchao.float8
    except ImportError:
        raise ConfigError("--fp8 needs torchao; pip install llava-fast[torchao]") from None
    return torchao.float8
