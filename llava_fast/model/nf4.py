"""A frozen base in 4 bits for QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4 with double quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_fast.errors import ConfigError
from llava_fast.model.decoder import projections
from llava_kernels import linear

if TYPE_CHECKING:
    from llava_fast.model.llava import Llava


class Nf4Linear(nn.Module):
    """``x @ W.T`` with a frozen W that lies in memory as NF4 and is expanded for every product, forward and backward.

    The pieces of a merged product are rounded each by itself, so their codes are those that bitsandbytes' own
    ``Linear4bit`` has for LLaMA's projections. The codes stay on the device where they were made.

    Args:
        weight: (N, K).
        pieces: rows of ``weight`` by name, which together are all of it.
        device: where the codes are made.
        dtype: of the expanded weight.
    """

    def __init__(self, weight: Tensor, pieces: dict[str, slice], device: torch.device, dtype: torch.dtype):
        super().__init__()
        functional = _bitsandbytes()
        self.out_features, self.in_features = weight.shape
        self.device, self.dtype, self.rows = device, dtype, pieces
        self.packed = {
            name: functional.quantize_4bit(
                weight[rows].detach().to(device, dtype).contiguous(), quant_type="nf4", compress_statistics=True
            )
            for name, rows in pieces.items()
        }

    @property
    def nbytes(self) -> int:
        """Of the codes and their scales: 4.127 bits a weight, by double quantization in 64s and 256s."""
        return int(self.out_features * self.in_features * (4 + 8 / 64 + 32 / (64 * 256)) / 8)

    def matrix(self) -> Tensor:
        """(N, K), made anew by each call."""
        whole = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.device)
        for name, rows in self.rows.items():
            whole[rows] = _bitsandbytes().dequantize_4bit(*self.packed[name])
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, K) -> (T, N)."""
        return _FrozenProduct.apply(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nf4"


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.matrix())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.matrix(), None


def check_available(device: torch.device) -> None:
    """Raise a ConfigError, in one line, where QLoRA cannot run: without a CUDA device, or without bitsandbytes."""
    if device.type != "cuda":
        raise ConfigError(
            f"a base in 4 bits (QLoRA) needs a CUDA device, and this run is on {device.type}; leave out --lora-bits to "
            f"train LoRA on full weights"
        )
    _bitsandbytes()


def quantize_base(model: Llava, device: torch.device) -> None:
    """Round the products of the decoder's layers to NF4, in place, one after another, and move the model to ``device``.

    Embeddings, norms, head, projector and tower stay as they are. The full model need fit the host alone.

    Args:
        model: without adapters, on any device, in the dtype to compute in.
        device: where the model is to be trained.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    for layer in model.decoder.layers:
        for product, pieces in projections(model.config.text).items():
            setattr(layer, product, Nf4Linear(getattr(layer, product).weight, pieces, device, model.dtype))
    model.to(device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise ConfigError("a base in 4 bits (QLoRA) needs bitsandbytes; pip install llava-fast[qlora]") from None
    return functional
