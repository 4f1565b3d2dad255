"""sample on CPU tensors through the C library (lk_sample): pass after pass over a row that stays in the cache."""

from __future__ import annotations

from ctypes import Structure, c_int64, c_void_p

import torch
from torch import Tensor

from llava_kernels import native

KINDS = {  # settings, (B,) each, and what the library takes them as
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
}


class SampleArgs(Structure):
    """lk_sample_args."""

    _fields_ = [
        *[(name, c_int64) for name in ("rows", "vocabulary")],
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        *[(name, c_void_p) for name in ("seeds", "positions", *KINDS, "counts")],
        ("counts_stride", c_int64),
        ("in_prompt", c_void_p),
        ("in_prompt_stride", c_int64),
        *[(name, c_void_p) for name in ("table_rows", "ids", "logprobs")],
    ]


def fits(logits: Tensor) -> bool:
    """Whether the C library draws from these: float32 on a CPU, where it was built and nothing else is asked for."""
    return logits.dtype == torch.float32 and native.use_native(logits.detach(), choices=("auto", "native"))


def sample(logits: Tensor, seeds: Tensor, positions: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`llava_kernels.sample`, whose arguments have been checked; rest: those of KINDS, counts, in_prompt."""
    rows, vocabulary = logits.shape
    *settings, counts, in_prompt = rest
    kept = {  # what the addresses point to
        name: setting.to(kind).contiguous()
        for (name, kind), setting in zip(KINDS.items(), settings, strict=True)
        if setting is not None
    }
    kept |= {"logits": _by_rows(logits), "seeds": seeds.contiguous(), "positions": positions.contiguous()}
    kept |= {"ids": torch.empty(rows, dtype=torch.int64), "logprobs": torch.empty(rows)}
    if counts is not None:
        kept["counts"] = _by_rows(counts.int())
    if in_prompt is not None:
        kept["in_prompt"] = _by_rows(in_prompt.bool())
    strides = {
        f"{name}_stride": kept[name].stride(0)
        for name in ("logits", "counts", "in_prompt")
        if name in kept and rows > 1
    }
    addresses = {name: tensor.data_ptr() for name, tensor in kept.items()}
    native.handle().sample(SampleArgs(rows=rows, vocabulary=vocabulary, **addresses, **strides))
    return kept["ids"], kept["logprobs"]


def _by_rows(table: Tensor) -> Tensor:
    """(B, V) with a row's values side by side, and rows apart."""
    return table if table.stride(1) == 1 and table.stride(0) >= table.shape[1] else table.contiguous()
