"""The layout of a step's arrays in one piece of memory: what goes in by bytes comes out as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava_fast.engine.transfer import ALIGNMENT, download, gather, layout, upload, views

ARRAYS = {
    "ids": np.arange(5, dtype=np.int64) - 3,
    "table": np.arange(21, dtype=np.int32).reshape(3, 7),
    "nothing": np.zeros(0, dtype=np.int64),
    "part": np.arange(40, dtype=np.int32).reshape(4, 10)[:, :3],  # rows with gaps
    "values": np.array([0.5, -np.inf], dtype=np.float32),
}


def test_layout_and_views():
    total, places = layout(ARRAYS)
    assert all(place % ALIGNMENT == 0 for place in places.values())
    memory = torch.zeros(total, dtype=torch.uint8)
    for name, array in ARRAYS.items():
        raw = np.frombuffer(array.tobytes(), dtype=np.uint8)
        memory[places[name] : places[name] + array.nbytes] = torch.from_numpy(raw.copy())
    for name, tensor in views(ARRAYS, places, memory).items():
        assert torch.equal(tensor, torch.from_numpy(ARRAYS[name].copy())), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_upload_and_download(device):
    sent = upload(ARRAYS, torch.device(device))
    for name, tensor in sent.items():
        assert tensor.device.type == device
        back = download(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(back, torch.from_numpy(ARRAYS[name].copy())), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_is_indexing(dtype):
    table, rows = torch.randn(9, 4).to(dtype).requires_grad_(), torch.tensor([3, 0, 8, 3])
    found = gather(table, rows)
    assert found.dtype == dtype and torch.equal(found, table.detach()[rows])
    assert gather(table, rows[:0]).shape == (0, 4)
