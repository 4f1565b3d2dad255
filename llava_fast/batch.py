"""PackedBatch: the one thing that data hands to the model. No batch dimension, no padding."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llava_fast.config import IGNORE


@dataclass
class PackedBatch:
    """S sequences laid end to end as T tokens, P of which are rows of N images and L of which are supervised.

    The row lists and ``max_seqlen`` are worked out on the host when they are not given, so nothing on the device ever
    searches for a token and nothing has to be copied back.

    Attributes:
        input_ids: (T,) int64. Text token ids; at image positions the image token id.
        labels: (T,) int64. Next-token targets, already shifted; ``IGNORE`` (-100) where nothing is learned.
        position_ids: (T,) int32. Restart at 0 in each sequence.
        cu_seqlens: (S+1,) int32. Where each sequence starts; attention never crosses a boundary.
        pixel_values: (N, 3, H, W) float. The images in the order in which they occur. N may be 0. Or (N, rows, C), the
            tower's features of them, worked out before.
        image_token_id: the id that stands at image positions.
        image_rows: (P,) int32. Row p of the image features goes to packed position ``image_rows[p]``.
        text_rows: (T-P,) int32. All other positions.
        supervised_rows: (L,) int32. Where labels are not ``IGNORE``.
        max_seqlen: length of the longest sequence.
        seqlens: the S sequence lengths on the host.
        sample_ids: the ids of the samples, in order, for reports. May be empty.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    pixel_values: Tensor
    image_token_id: int
    image_rows: Tensor = None  # type: ignore[assignment]  # filled in below
    text_rows: Tensor = None  # type: ignore[assignment]
    supervised_rows: Tensor = None  # type: ignore[assignment]
    max_seqlen: int = 0
    seqlens: tuple[int, ...] = ()
    sample_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.seqlens:
            self.seqlens = tuple(self.cu_seqlens.diff().tolist())
        if not self.max_seqlen:
            self.max_seqlen = max(self.seqlens, default=0)
        if self.image_rows is None:
            self.image_rows = _where(self.input_ids == self.image_token_id)
        if self.text_rows is None:
            self.text_rows = _where(self.input_ids != self.image_token_id)
        if self.supervised_rows is None:
            self.supervised_rows = _where(self.labels != IGNORE)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_supervised(self) -> int:
        return self.supervised_rows.shape[0]

    @property
    def num_images(self) -> int:
        return self.pixel_values.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedBatch:
        """This batch on ``device``, with ``pixel_values`` in ``dtype``. Copies do not block when memory is pinned."""
        return self._map(lambda name, t: t.to(device, dtype if name == "pixel_values" else None, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """This batch in page-locked host memory."""
        return self._map(lambda name, t: t.pin_memory())

    def _map(self, change: Any) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackedBatch(**{k: change(k, v) if isinstance(v, Tensor) else v for k, v in values.items()})


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1).to(torch.int32)
