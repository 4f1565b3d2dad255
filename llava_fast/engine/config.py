"""EngineConfig: the budgets of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from llava_fast.errors import ConfigError

CACHE_DTYPES = ("auto", "fp8")
ACTIVATION_BITS = (8, 16)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine may use. Every default works.

    Attributes:
        kv_cache_bytes: bytes for keys and values; None takes ``memory_fraction`` of what is free.
        memory_fraction: share of the device's free memory; None: 0.9 on CUDA, a quarter on a CPU. Never more is taken
            than ``max_sequences`` full contexts need.
        kv_cache_dtype: "auto" for the model's own, or "fp8" (e4m3) for half the bytes of bf16.
        activation_bits: of what meets int8 and int4 weights on a CPU. 8: what meets int4, and many tokens at a time
            that meet int8, are rounded to 8 bits, with a scale for each 64 values of a token or each group of a weight,
            where that is faster; 16: none are; None: 8 in a bfloat16 model.
        compact_weights: keep what a CPU decodes with in bfloat16 a second time, in 12 bits a weight and exact: steps of
            one or two answers then read a quarter less. None: where that takes at most a quarter of the free memory.
        block_size: tokens of one block of the cache, a power of two.
        max_sequences: answers that are worked on at a time.
        max_step_tokens: tokens computed in one step; longer prompts are computed in chunks.
        max_queue: requests that may wait; beyond it ``submit`` raises :class:`~llava_fast.errors.QueueFullError`.
        max_length: tokens of prompt and answer together; None: the model's context.
        max_images: images of one request.
        max_n: answers of one request.
        prefix_caching: share the computed beginnings of prompts between requests.
        feature_cache_bytes: for the vision tower's features of images seen before; 0 for none.
        image_batch: images that go through the vision tower at a time.
        image_workers: threads that read and resize images; None: up to four, and none (the caller of ``submit`` does
            it) in an engine without a thread of its own.
        lookahead: steps launched before the tokens of the one before are read; None: 1 on CUDA, where the copy back
            then overlaps the next step, 0 on a CPU.
        cuda_graphs: capture decode steps and the vision tower; no effect on a CPU.
        warmup: run every shape once at the start, so that no request waits for a compilation.

    Raises:
        ConfigError: on construction, a value that cannot work.
    """

    kv_cache_bytes: int | None = None
    memory_fraction: float | None = None
    kv_cache_dtype: str = "auto"
    activation_bits: int | None = None
    compact_weights: bool | None = None
    block_size: int = 16
    max_sequences: int = 256
    max_step_tokens: int = 2048
    max_queue: int = 1024
    max_length: int | None = None
    max_images: int = 64
    max_n: int = 64
    prefix_caching: bool = True
    feature_cache_bytes: int = 256 << 20
    image_batch: int = 16
    image_workers: int | None = None
    lookahead: int | None = None
    cuda_graphs: bool = True
    warmup: bool = True

    def __post_init__(self) -> None:
        at_least = {"block_size": 1, "max_sequences": 1, "max_queue": 1, "max_images": 0, "max_n": 1, "image_batch": 1}
        for name, least in {**at_least, "feature_cache_bytes": 0, "max_step_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be {least} or more")
        for name in ("kv_cache_bytes", "max_length", "image_workers", "lookahead"):
            value = getattr(self, name)
            if value is not None and value < (name in ("kv_cache_bytes", "max_length")):
                raise ConfigError(f"{name}={value} is too small; leave it None for the default")
        if self.kv_cache_dtype not in CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not known; choose one of {', '.join(CACHE_DTYPES)}"
            )
        if self.activation_bits not in (None, *ACTIVATION_BITS):
            raise ConfigError(f"activation_bits={self.activation_bits} must be 8 or 16; leave it None for the default")
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size={self.block_size} must be a power of two, such as 16")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction={self.memory_fraction} must be above 0 and at most 1")
        if self.max_step_tokens <= self.max_sequences:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens} must be above max_sequences={self.max_sequences}: every "
                f"running answer takes one token of a step, and a prompt needs at least one more"
            )
