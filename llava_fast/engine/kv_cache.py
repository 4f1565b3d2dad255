"""The paged key-value cache: one tensor, sized by a budget in bytes."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from llava_fast.config import TextConfig
from llava_fast.engine.config import EngineConfig
from llava_fast.engine.memory import free_bytes
from llava_fast.errors import ConfigError

FP8 = torch.float8_e4m3fn


class KVCache:
    """Keys and values of every layer, (layers, blocks, block_size, 2, kv_heads, head_dim).

    Raises:
        ConfigError: the budget does not hold one block, or there is no such memory.
    """

    def __init__(self, text: TextConfig, config: EngineConfig, device: torch.device, dtype: torch.dtype):
        if config.kv_cache_dtype == "fp8":
            dtype = FP8
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize
        self.block_size = config.block_size
        self.block_bytes = token * config.block_size
        longest = min(config.max_length or text.max_position_embeddings, text.max_position_embeddings)
        most = config.max_sequences * -(-longest // config.block_size)
        if config.kv_cache_bytes is None:
            self.num_blocks = min(most, int(free_bytes(device) * _fraction(config, device)) // self.block_bytes)
        else:
            self.num_blocks = config.kv_cache_bytes // self.block_bytes
        if self.num_blocks < 1:
            raise ConfigError(
                f"the key-value cache has no room for one block of {config.block_size} tokens, {self.block_bytes} "
                f"bytes; raise kv_cache_bytes={config.kv_cache_bytes} or memory_fraction={config.memory_fraction}"
            )
        shape = (text.num_hidden_layers, self.num_blocks, config.block_size, 2, text.num_key_value_heads, text.head_dim)
        self.memory = _zeros(shape, dtype, device)
        self.layers: list[tuple[Tensor, Tensor]] = [(layer[:, :, 0], layer[:, :, 1]) for layer in self.memory]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def _fraction(config: EngineConfig, device: torch.device) -> float:
    return config.memory_fraction or (0.9 if device.type == "cuda" else 0.25)


def _large_pages(count: int) -> mmap.mmap:
    """Zeros, in pages of 2 MiB where Linux has them: small ones take four times as long to be handed out."""
    try:
        pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones are seldom large
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{count} bytes for the key-value cache cannot be had ({error}); lower kv_cache_bytes"
        ) from None
    with suppress(AttributeError, OSError):  # another system, or one without such pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since 0 * NaN is NaN: what was never written has no weight in the softmax, but must be a number. On a CPU
    the system hands the pages out when they are first used."""
    count = math.prod(shape) * dtype.itemsize
    if device.type == "cpu":
        memory = torch.frombuffer(_large_pages(count), dtype=torch.uint8)
    else:
        memory = torch.zeros(count, dtype=torch.uint8, device=device)
    return memory.view(dtype).view(shape)
