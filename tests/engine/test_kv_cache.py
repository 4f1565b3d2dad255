"""KVCache on a CPU: memory that the system hands out when it is first used, of the process alone, in large pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_fast.config import ModelConfig
from llava_fast.engine import EngineConfig
from llava_fast.engine.kv_cache import KVCache
from llava_fast.errors import ConfigError

TEXT = ModelConfig.preset("tiny").text
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping(address: int) -> tuple[str, list[str]]:
    """(permissions, flags) of the process's memory at an address, as /proc/self/smaps has them."""
    permissions = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            permissions = rest[0] if first <= address < last else ""
        elif permissions and name == "VmFlags:":
            return permissions, rest
    raise AssertionError(f"nothing lies at {address:#x}")


@pytest.mark.skipif(not HUGE.exists(), reason="this system has no transparent huge pages to ask for")
def test_memory_is_private_and_asks_for_large_pages():
    cache = KVCache(TEXT, EngineConfig(kv_cache_bytes=8 << 20), torch.device("cpu"), torch.float32)
    permissions, flags = mapping(cache.memory.data_ptr())
    assert permissions == "rw-p" and "hg" in flags  # shared memory has large pages only where they are forced


def test_memory_that_cannot_be_had_is_a_config_error():
    with pytest.raises(ConfigError, match="cannot be had"):
        KVCache(TEXT, EngineConfig(kv_cache_bytes=1 << 60), torch.device("cpu"), torch.float32)
