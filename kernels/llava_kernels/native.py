"""Operations on CPU tensors through the C library: what torch.ops.llava_kernels runs there without gradients.

The engine does not come this way: it runs all its layers in one call (:class:`llava_kernels.library.Decoder`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from llava_kernels.dispatch import chosen, constant_under_compile

MAX_HEAD_DIM, MAX_GROUP = 256, 32  # kernels/csrc/cpu/isa.h
_of_thread = threading.local()


class ProjectSpliceArgs(Structure):
    """lk_project_splice_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("images", "image_patches", "texts", "channels", "width", "vocabulary")],
        ("features", c_void_p),
        *[(name, c_int64) for name in ("image_stride", "patch_stride")],
        *[(name, c_void_p) for name in ("weight", "bias", "embedding", "input_ids", "image_rows", "text_rows", "out")],
    ]


class PagedAttentionArgs(Structure):
    """lk_paged_attention_args."""

    _fields_ = [
        *[(name, c_int) for name in ("dtype", "cache_dtype")],
        *[(name, c_int64) for name in ("tokens", "sequences", "heads", "kv_heads", "head_dim", "block_size")],
        ("max_query", c_int64),
        ("q", c_void_p),
        *[(name, c_int64) for name in ("q_token_stride", "q_head_stride")],
        *[(name, c_void_p) for name in ("k_cache", "v_cache")],
        *[(name, c_int64) for name in ("cache_block_stride", "cache_token_stride", "cache_head_stride")],
        ("block_table", c_void_p),
        ("table_stride", c_int64),
        *[(name, c_void_p) for name in ("context_lens", "query_start")],
        *[(name, c_float) for name in ("k_scale", "v_scale")],
        ("splits", c_int64),
        *[(name, c_void_p) for name in ("workspace", "out")],
    ]


def use_native(*tensors: Tensor | None, choices: tuple[str, ...] = ("native",)) -> bool:
    """Whether the op that is about to run on ``tensors`` goes to the C library: where one of ``choices`` is asked for.

    Not by itself ("auto") for 8 and 4 bits: activations that meet them are rounded to 16 bits there, which float32
    callers would see.
    """
    if chosen() not in choices or not available():
        return False
    given = [t for t in tensors if t is not None]
    return (
        all(t.device.type == "cpu" for t in given)
        and all(t.dtype == given[0].dtype for t in given)
        and given[0].dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
    )


def call(op: Callable[..., Any], function: Callable[..., Any], *given: Tensor | None) -> Any:
    """The custom op ``op``, or the ``function`` behind it where nothing compiles the call or stands in for a tensor:
    torch's way to a custom op takes 150 us, and two seconds the first time, to import torch._dynamo."""
    direct = not torch.compiler.is_compiling() and all(type(t) in (Tensor, Parameter, type(None)) for t in given)
    return function(*given) if direct else op(*given)


@constant_under_compile  # which sees no mark on what a cache wraps
def available() -> bool:
    return _available()


@cache
def _available() -> bool:
    from llava_kernels import library  # knows the package, whose operations know this module

    return library.load() is not None


def handle() -> Any:
    """This thread's own handle, since a handle serves one at a time; its threads sleep between calls."""
    from llava_kernels import library

    threads = library.default_threads()
    found = getattr(_of_thread, "handle", None)
    if found is None or found.threads != threads:
        found = _of_thread.handle = library.Handle(threads)
    return found


def dense(x: Tensor) -> Tensor:
    """Its last dimension side by side. A stride of 0 would stand for contiguous: expanded tensors are copied."""
    return x if x.stride(-1) == 1 and all(x.stride()) else x.contiguous()


def runs_on_cpu(op: Any, native: Callable[..., Any]) -> None:
    """Make ``native`` the implementation of the custom op ``op`` on CPU tensors, but where Triton's is asked for, which
    its interpreter runs there."""
    of_triton = op._init_fn

    @op.register_kernel("cpu")
    def _(*args: Any) -> Any:
        return of_triton(*args) if chosen() == "triton" else native(*args)


def linear_int8(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from llava_kernels import library, quantized_linear

    return _linear(x, library.int8_weight(quantized_linear.Int8Weight(words, scale, x.shape[-1])), bias)


def linear_int4(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor, channel: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    from llava_kernels import library, quantized_linear

    weight = quantized_linear.Int4Weight(words, scale, offset, channel, group_size, x.shape[-1])
    return _linear(x, library.int4_weight(weight), bias)


def _linear(x: Tensor, weight: Any, bias: Tensor | None, gelu: bool = False) -> Tensor:
    rows = dense(x.reshape(-1, x.shape[-1]))
    out = handle().linear(rows, weight, None if bias is None else bias.contiguous(), gelu)
    return out.view(*x.shape[:-1], out.shape[-1])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from llava_kernels import library

    if not x.numel() or not weight.numel():
        return F.gelu(F.linear(x, weight, bias))
    weight = weight.contiguous().view(-1).view(weight.shape)  # by name: what is described below lives as long
    return _linear(x, library.float_weight(weight), bias, gelu=True)


def project_splice(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    input_ids: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
) -> Tensor:
    """Features are read where they lie, if their channels are contiguous."""
    from llava_kernels import library

    features = dense(features if features.dim() == 3 else features.reshape(1, -1, features.shape[-1]))
    kept = [weight.contiguous(), None if bias is None else bias.contiguous(), embedding.contiguous()]
    kept += [input_ids.contiguous().long(), image_rows.contiguous().int(), text_rows.contiguous().int()]
    out = embedding.new_empty(len(input_ids), embedding.shape[1])
    lk = handle()
    args = ProjectSpliceArgs(
        library.DTYPES[features.dtype], features.shape[0], features.shape[1], len(text_rows), weight.shape[1],
        weight.shape[0], embedding.shape[0], features.data_ptr(), features.stride(0), features.stride(1),
        *(None if t is None else t.data_ptr() for t in kept), out.data_ptr(),
    )  # fmt: skip
    lk.check(lk.library.lk_project_splice(lk._handle, byref(args), None))
    return out


def takes_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, context_lens: Tensor, query_start: Tensor) -> bool:
    """Whether the library has code for these shapes: every sequence holds its own queries, and caches are alike."""
    return (
        q.shape[2] <= MAX_HEAD_DIM
        and q.shape[1] <= MAX_GROUP * k_cache.shape[2]
        and q.stride(2) == k_cache.stride(3) == 1
        and k_cache.stride() == v_cache.stride()
        and bool((context_lens >= query_start.diff()).all())
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    max_query: int,
) -> Tensor:
    from llava_kernels import library

    (tokens, heads, dim), (_, block_size, kv_heads, _) = q.shape, k_cache.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    table, lengths, starts = (t.contiguous().int() for t in (block_table, context_lens, query_start))
    lk, kind = handle(), library.DTYPES[q.dtype]
    args = PagedAttentionArgs(
        kind, kind, tokens, len(lengths), heads, kv_heads, dim, block_size, max_query, q.data_ptr(), q.stride(0),
        q.stride(1), k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:3], table.data_ptr(), table.shape[1],
        lengths.data_ptr(), starts.data_ptr(), 0.0, 0.0, 0, None, out.data_ptr(),
    )  # fmt: skip
    lk.check(lk.library.lk_paged_attention(lk._handle, byref(args), None))
    return out
