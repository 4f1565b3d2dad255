"""libllava_kernels from Python: the CPU half of the C library (kernels/include/llava_kernels.h), through ctypes.

ctypes lets go of the interpreter's lock during a call. Pointers are those of torch's tensors; nothing is copied.
"""

from __future__ import annotations

import logging
import os
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llava_kernels

log = logging.getLogger(__name__)

NAME = "libllava_kernels.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 2}
BFLOAT16 = 1  # LK_WEIGHT_BFLOAT16
# Of processors, by the names that the C library has for them; a build or a processor may lack some.
INSTRUCTIONS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx", "neon")


class Weight(Structure):
    """lk_weight."""

    _fields_ = [
        ("format", c_int),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("data", c_void_p),
        ("row_stride", c_int64),
        ("scale", c_void_p),
        ("group_scale", c_void_p),
        ("group_offset", c_void_p),
        ("group_size", c_int64),
        ("group_pairs", c_void_p),
        ("compact", c_void_p),
    ]


class Layer(Structure):
    """lk_layer."""

    _fields_ = [
        ("attention_norm", c_void_p),
        ("qkv", Weight),
        ("out", Weight),
        ("mlp_norm", c_void_p),
        ("gate_up", Weight),
        ("down", Weight),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
    ]


class DecoderArgs(Structure):
    """lk_decoder_args."""

    _fields_ = [
        ("dtype", c_int),
        ("cache_dtype", c_int),
        *[(name, c_int64) for name in ("layers", "width", "heads", "kv_heads", "head_dim")],
        ("eps", c_float),
        ("layer", POINTER(Layer)),
        ("norm", c_void_p),
        ("head", Weight),
        ("cos", c_void_p),
        ("sin", c_void_p),
        *[(name, c_int64) for name in ("positions", "blocks", "block_size")],
        *[(name, c_int64) for name in ("cache_block_stride", "cache_token_stride", "cache_head_stride")],
        ("screen", Weight),
        ("screen_error", c_void_p),
        ("activation_bits", c_int),
    ]


class StepArgs(Structure):
    """lk_step_args."""

    _fields_ = [
        ("dtype", c_int),
        ("tokens", c_int64),
        ("sequences", c_int64),
        *[(name, c_void_p) for name in ("x", "positions", "slots", "block_table")],
        ("table_stride", c_int64),
        *[(name, c_void_p) for name in ("context_lens", "query_start", "hidden", "rows")],
        ("outputs", c_int64),
    ]


class NextArgs(Structure):
    """lk_next_args."""

    _fields_ = [
        ("dtype", c_int),
        ("embedding", c_void_p),
        *[(name, c_int64) for name in ("vocabulary", "sequences")],
        *[(name, c_void_p) for name in ("rows", "computed")],
        ("table_rows", c_int64),
        *[(name, c_void_p) for name in ("last", "block_table")],
        ("table_stride", c_int64),
        *[(name, c_void_p) for name in ("tokens", "logits")],
    ]


class VisionLayer(Structure):
    """lk_vision_layer."""

    _fields_ = [
        *[(name, c_void_p) for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")],
        *[(name, Weight) for name in ("qkv", "out", "fc1", "fc2")],
        *[(name, c_void_p) for name in ("qkv_bias", "out_bias", "fc1_bias", "fc2_bias")],
    ]


class VisionArgs(Structure):
    """lk_vision_args."""

    _fields_ = [
        ("dtype", c_int),
        *[(name, c_int64) for name in ("layers", "width", "heads")],
        ("eps", c_float),
        ("patch_embedding", Weight),
        *[(name, c_void_p) for name in ("class_embedding", "position_embedding", "norm_weight", "norm_bias")],
        ("layer", POINTER(VisionLayer)),
        *[(name, c_int64) for name in ("images", "patch", "grid")],
        *[(name, c_void_p) for name in ("pixels", "out")],
    ]


class LinearArgs(Structure):
    """lk_linear_args."""

    _fields_ = [
        ("dtype", c_int),
        ("rows", c_int64),
        ("weight", Weight),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("gelu", c_int),
        ("activation_bits", c_int),
    ]


class LibraryError(RuntimeError):
    """A call of the C library failed; the message is the library's."""


@cache
def load() -> CDLL | None:
    """The library that was built with the package, or the one that LLAVA_KERNELS_LIBRARY names; None where there is
    none or it cannot be loaded, which is logged once."""
    named = os.environ.get("LLAVA_KERNELS_LIBRARY")
    places = [Path(named)] if named else [Path(folder) / NAME for folder in llava_kernels.__path__]
    for place in places:
        if named or place.exists():
            try:
                return _declared(CDLL(str(place)))
            except (OSError, AttributeError) as error:
                log.warning("%s cannot be used: %s", place, error)
                return None
    without = "CPUs decode with torch and pictures are resized by PIL, slower"
    log.warning("%s was not built with this package (that takes a C++ compiler): %s", NAME, without)
    return None


def _declared(library: CDLL) -> CDLL:
    library.lk_last_error.restype = library.lk_instructions.restype = c_char_p
    library.lk_last_error.argtypes = library.lk_instructions.argtypes = [c_void_p]
    library.lk_error_string.restype, library.lk_error_string.argtypes = c_char_p, [c_int]
    library.lk_prepare_image.restype = c_int  # its arguments: llava_kernels.image
    library.lk_create.argtypes = [POINTER(c_void_p), c_int]
    library.lk_set_threads.argtypes = [c_void_p, c_int]
    library.lk_set_instructions.argtypes = [c_void_p, c_char_p]
    library.lk_linear.argtypes = [c_void_p, POINTER(LinearArgs), c_void_p]
    library.lk_decoder_create.argtypes = [c_void_p, POINTER(DecoderArgs), POINTER(c_void_p)]
    library.lk_decoder_step.argtypes = [c_void_p, POINTER(StepArgs)]
    library.lk_vision_tower.argtypes = [c_void_p, POINTER(VisionArgs)]
    library.lk_decoder_head.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
    library.lk_sample.argtypes = [c_void_p, c_void_p]
    library.lk_decoder_next.argtypes = [c_void_p, POINTER(NextArgs)]
    library.lk_compact_create.argtypes = [c_void_p, POINTER(Weight), POINTER(c_void_p)]
    library.lk_compact_bytes.argtypes, library.lk_compact_bytes.restype = [c_void_p], c_int64
    for name in ("lk_destroy", "lk_decoder_destroy", "lk_compact_destroy"):
        function = getattr(library, name)
        function.argtypes, function.restype = [c_void_p], None
    return library


class Handle:
    """A CPU handle: its threads and instruction set. One thread uses it at a time.

    Args:
        threads: that a call may use; None: as many as torch uses, but no more than this process has processors.
        instructions: one of ``INSTRUCTIONS``; None: the best there is.

    Raises:
        LibraryError: there is no library, or the processor lacks the instructions.
    """

    def __init__(self, threads: int | None = None, instructions: str | None = None):
        self._handle = c_void_p()
        library = load()
        if library is None:
            raise LibraryError(f"{NAME} is not to be had; install llava_fast where there is a C++ compiler")
        self.library, self._linear_args = library, LinearArgs()
        if library.lk_create(byref(self._handle), -1):
            raise LibraryError(library.lk_last_error(None).decode())
        self.threads = threads or default_threads()
        self.check(library.lk_set_threads(self._handle, self.threads))
        self.check(library.lk_set_instructions(self._handle, instructions.encode() if instructions else None))

    @property
    def instructions(self) -> str:
        return self.library.lk_instructions(self._handle).decode()

    def check(self, status: int) -> None:
        if status:
            raise LibraryError(self.library.lk_last_error(self._handle).decode())

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """x: (rows, K) float32 or bfloat16, its rows contiguous; bias: (N,) in its dtype -> (rows, N) in its dtype, or
        the exact GELU of that.

        Raises:
            LibraryError: a size that cannot be.
        """
        args = self._linear_args  # made once: making one takes as long as a small product
        dtype, rows = x.dtype, len(x)
        out = torch.empty(rows, weight.out_features, dtype=dtype)
        args.dtype, args.rows, args.weight = DTYPES[dtype], rows, weight
        args.x, args.x_stride, args.out = x.data_ptr(), x.stride(0), out.data_ptr()
        args.bias, args.gelu = None if bias is None else bias.data_ptr(), gelu
        self.run_linear(args)
        return out

    def run_linear(self, args: LinearArgs) -> None:
        """The same with arguments that were made before: about 15 us less a call."""
        self.check(self.library.lk_linear(self._handle, byref(args), None))

    def sample(self, args: Structure) -> None:
        """args: llava_kernels.native_sample.SampleArgs."""
        self.check(self.library.lk_sample(self._handle, byref(args)))

    def vision_tower(self, args: VisionArgs) -> None:
        self.check(self.library.lk_vision_tower(self._handle, byref(args)))

    def __del__(self) -> None:
        if self._handle:
            self.library.lk_destroy(self._handle)


class Decoder:
    """A decoder whose tensors are kept alive in ``keep``."""

    def __init__(self, handle: Handle, args: DecoderArgs, keep: Any):
        self.handle, self.keep = handle, keep
        self._decoder = c_void_p()
        handle.check(handle.library.lk_decoder_create(handle._handle, byref(args), byref(self._decoder)))

    def step(self, args: StepArgs) -> None:
        self.handle.check(self.handle.library.lk_decoder_step(self._decoder, byref(args)))

    def head(self, rows: int, hidden: int, logits: int) -> None:
        self.handle.check(self.handle.library.lk_decoder_head(self._decoder, rows, hidden, logits))

    def next(self, args: NextArgs) -> None:
        self.handle.check(self.handle.library.lk_decoder_next(self._decoder, byref(args)))

    def __del__(self) -> None:
        if self._decoder:
            self.handle.library.lk_decoder_destroy(self._decoder)


class Compact:
    """The values of a bfloat16 weight in 12 bits each, nothing rounded: what few activations meet in its place.

    Attributes:
        bytes: of memory that it takes.

    Raises:
        LibraryError: the weight's values span too many powers of two.
    """

    def __init__(self, handle: Handle, weight: Weight):
        self.library, self._compact = handle.library, c_void_p()
        handle.check(self.library.lk_compact_create(handle._handle, byref(weight), byref(self._compact)))
        self.bytes: int = self.library.lk_compact_bytes(self._compact)

    @property
    def address(self) -> int | None:
        """For :attr:`Weight.compact`."""
        return self._compact.value

    def __del__(self) -> None:
        if self._compact:
            self.library.lk_compact_destroy(self._compact)


def default_threads() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), usable))


def float_weight(weight: Tensor) -> Weight:
    """(N, K) float32 or bfloat16 with contiguous rows, where it lies."""
    assert weight.stride(1) == 1 and weight.dtype in DTYPES
    return Weight(
        format=BFLOAT16 if weight.dtype == torch.bfloat16 else 0,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        data=weight.data_ptr(),
        row_stride=weight.stride(0),
    )


def int8_weight(weight: llava_kernels.Int8Weight) -> Weight:
    return Weight(
        format=2,
        out_features=weight.words.shape[0],
        in_features=weight.in_features,
        data=weight.words.data_ptr(),
        scale=weight.scale.data_ptr(),
    )


def int4_weight(weight: llava_kernels.Int4Weight, pairs: Tensor | None = None) -> Weight:
    """pairs: of :func:`group_pairs`, for a weight that is used more than once."""
    return Weight(
        format=3,
        out_features=weight.words.shape[0],
        in_features=weight.in_features,
        data=weight.words.data_ptr(),
        scale=weight.channel.data_ptr(),
        group_scale=weight.scale.data_ptr(),
        group_offset=weight.offset.data_ptr(),
        group_size=weight.group_size,
        group_pairs=None if pairs is None else pairs.data_ptr(),
    )


def group_pairs(weight: llava_kernels.Int4Weight) -> Tensor:
    """(N, groups rounded up to a multiple of 8) int32: scales in the upper halves, offsets in the lower. What
    belongs to a row of the weight lies side by side."""
    groups, features = weight.scale.shape
    halves = torch.zeros(features, -(-groups // 8) * 8, 2, dtype=torch.bfloat16)
    halves[:, :groups, 0], halves[:, :groups, 1] = weight.offset.T, weight.scale.T  # the lower half lies first
    return halves.view(torch.int32).squeeze(-1)
