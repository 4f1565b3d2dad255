"""Small arrays to the device in one copy, results back without waiting, rows of a table."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; what the kernels' widest loads want
_TORCH = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


def upload(arrays: dict[str, np.ndarray], device: torch.device, into: Tensor | None = None) -> dict[str, Tensor]:
    """The arrays as tensors on ``device``; on CUDA by one copy that the host does not wait for.

    Args:
        arrays: int32, int64 or float32. On a CPU the tensors share their memory.
        device: where to.
        into: uint8 memory on the device to lay them out in, so that a CUDA graph finds them where they were.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    total, places = layout(arrays)
    host = torch.empty(total, dtype=torch.uint8, pin_memory=True)  # the allocator waits for the copy before reuse
    view = host.numpy()
    for name, array in arrays.items():
        view[places[name] : places[name] + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    if into is None:
        into = torch.empty(total, dtype=torch.uint8, device=device)
    into[:total].copy_(host, non_blocking=True)
    return views(arrays, places, into)


def layout(arrays: dict[str, np.ndarray]) -> tuple[int, dict[str, int]]:
    """Bytes in all, and where each array starts."""
    places, total = {}, 0
    for name, array in arrays.items():
        places[name] = total
        total += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return total, places


def views(arrays: dict[str, np.ndarray], places: dict[str, int], memory: Tensor) -> dict[str, Tensor]:
    parts = {name: memory[places[name] : places[name] + array.nbytes] for name, array in arrays.items()}
    return {name: part.view(_TORCH[arrays[name].dtype]).view(arrays[name].shape) for name, part in parts.items()}


def download(tensor: Tensor) -> Tensor:
    """A copy on the host; on CUDA it is under way when this returns, and an event must be waited for."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """table (V, D), rows (n,) -> (n, D). On a CPU by numpy: torch would wake threads, which then keep a core busy as
    they wait for more."""
    if table.device.type != "cpu":
        return table.index_select(0, rows)
    return torch.from_numpy(as_array(table).take(rows.numpy(), axis=0)).view(table.dtype)


def as_array(table: Tensor) -> np.ndarray:
    """The memory of float32 or 16-bit floats on a CPU, the latter as int16: numpy has no bfloat16."""
    return (table.detach() if table.dtype == torch.float32 else table.detach().view(torch.int16)).numpy()
