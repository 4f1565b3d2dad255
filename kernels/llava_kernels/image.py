"""Pictures to pixel tensors in one call of the C library: Pillow's bicubic resize and numpy's arithmetic, to the bit.

It takes no handle: any number of threads may call at once, and none of them holds the interpreter's lock meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_char_p, c_float, c_int, c_int64, c_uint8, c_void_p
from typing import NamedTuple

import numpy as np
from torch import Tensor

from llava_kernels.dispatch import chosen
from llava_kernels.library import NAME, LibraryError, load


class PrepareImageArgs(Structure):
    """lk_prepare_image_args."""

    _fields_ = [
        ("pixels", c_void_p),
        *[(name, c_int64) for name in ("height", "width", "row_stride", "pixel_stride")],
        *[(name, c_int64) for name in ("canvas_height", "canvas_width", "top", "left")],
        ("background", c_uint8 * 3),
        *[(name, c_int64) for name in ("new_height", "new_width", "out_top", "out_left", "size")],
        ("height_first", c_int),
        ("scale", c_float * 3),
        ("shift", c_float * 3),
        ("out", c_void_p),
        ("instructions", c_char_p),
    ]


class Placement(NamedTuple):
    """How a picture becomes a square; pairs are (vertical, horizontal).

    Attributes:
        canvas: size of what the picture is laid on and resized with.
        corner: where the picture's first pixel lies on it.
        new: the canvas's size once it is resized.
        window: where in that the square starts.
        height_first: heights are resized before widths; in between values are rounded.
    """

    canvas: tuple[int, int]
    corner: tuple[int, int]
    new: tuple[int, int]
    window: tuple[int, int]
    height_first: bool = False


def available() -> bool:
    """Whether pictures are to be prepared here: the library was built, and nothing else is asked for."""
    return chosen() in ("auto", "native") and load() is not None


def prepare(
    pixels: np.ndarray,
    out: Tensor,
    placement: Placement,
    background: Sequence[int],
    scale: Sequence[float],
    shift: Sequence[float],
    instructions: str | None = None,
) -> None:
    """A picture resized into ``out``, each byte as ``byte * scale + shift``, rounded after each of the two.

    Args:
        pixels: (H, W, 3) uint8; copied unless the pixels of a row lie end to end.
        out: (3, S, S) float32 on the CPU, contiguous.
        background: the canvas's colour, three bytes.
        scale, shift: of each colour.
        instructions: see :class:`llava_kernels.library.Handle`.

    Raises:
        LibraryError: there is no library, a size cannot be, or there is no memory.
    """
    library = load()
    if library is None:
        raise LibraryError(f"{NAME} is not to be had; install llava_fast where there is a C++ compiler")
    row_stride = pixels.strides[0]
    if pixels.strides[1:] != (3, 1) or not 3 * pixels.shape[1] <= abs(row_stride) < 1 << 31:
        pixels, row_stride = np.ascontiguousarray(pixels), 0  # end to end
    args = PrepareImageArgs(
        pixels.ctypes.data, *pixels.shape[:2], row_stride, 3, *placement.canvas, *placement.corner,
        tuple(background), *placement.new, *placement.window, out.shape[1], placement.height_first, tuple(scale),
        tuple(shift), out.data_ptr(), instructions.encode() if instructions else None,
    )  # fmt: skip
    status = library.lk_prepare_image(byref(args))
    if status:
        cause = library.lk_error_string(status).decode()
        raise LibraryError(f"cannot make {tuple(out.shape)} of a picture {pixels.shape} by {placement}: {cause}")
