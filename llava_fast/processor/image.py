"""Images to pixel tensors: reading any source safely, and the resize, crop and normalisation that CLIP towers expect.

The arithmetic is that of transformers' ``CLIPImageProcessor`` ("square") and ``LlavaImageProcessor`` with ``do_pad``
("pad"), on PIL's bicubic filter. Results agree with theirs to within one grey level. Where the C library was built, its
code (:mod:`llava_kernels.image`) takes the place of PIL's filter and numpy's arithmetic, and the bits are the same.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image
from torch import Tensor

from llava_fast.config import ASPECTS
from llava_fast.errors import ConfigError, ImageError
from llava_fast.processor.image_file import CountedFile, check_directory, check_file
from llava_kernels import image as native
from llava_kernels.image import Placement

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB, of values in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 178_956_970  # where PIL itself refuses by default

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor

_BICUBIC = Image.Resampling.BICUBIC
_BICUBIC_REACH = 2  # source pixels (of the coarser grid) that the filter sees on each side
_ELONGATED = 4  # long side over short side, and
_COSTLY = 1 << 22  # pixels of the plain way's largest step: above both, only what is kept of a resize is computed
_PICKS_ORDER = int(PIL.__version__.split(".")[0]) >= 13  # PIL resizes what loses most in height in height first
_UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ARRAY_CURE = "pass uint8, or floats in 0..1, of shape (H, W), (H, W, 3) or (H, W, 4)"
_TENSOR_CURE = "pass a tensor (3, H, W) or (H, W, 3) of uint8, or of floats in 0..1"


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any image source as an upright RGB picture.

    Args:
        source: a path; the bytes of a file (JPEG, PNG, WEBP, GIF, BMP or TIFF; of an animation the first frame); a PIL
            image; a uint8 or 0..1 float array (H, W), (H, W, 3) or (H, W, 4); or such a tensor (3, H, W) or (H, W, 3).
        max_pixels: the largest width times height accepted. Files are judged by their header, before decoding.

    Returns:
        An image of mode RGB. The EXIF orientation is applied, transparency is laid on white, 16-bit grey keeps its
        upper byte. The source is not changed; an RGB image that needs none of this is returned as it is.

    Raises:
        ImageError: the source is missing, truncated, empty, no image, too large or of an unsupported kind. The message
            names the path where there is one.
    """
    if isinstance(source, (str, os.PathLike)):
        return _load_path(Path(source), max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _load_file(BytesIO(source), f"image bytes ({len(source)} bytes)", max_pixels)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "PIL image", max_pixels)
    if isinstance(source, Tensor):
        return _to_rgb(_from_tensor(source), "tensor", max_pixels)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "array", max_pixels)
    raise ImageError(
        f"cannot read an image from {type(source).__name__}; pass a path, bytes, a PIL image, an array or a tensor"
    )


def is_rgb(source: object) -> TypeGuard[np.ndarray]:
    """Whether it is an array of what pixels become: (H, W, 3) uint8."""
    return isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3


def _load_path(path: Path, max_pixels: int) -> Image.Image:
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        cause = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{path}: cannot open the image file: {cause}") from error
    with file:
        return _load_file(file, str(path), max_pixels)


def _load_file(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    counted = CountedFile(file)
    image = open_image(file, name, max_pixels, counted=counted)
    counted.allow_pixels()
    return _to_rgb(image, name, max_pixels)


def open_image(
    file: IO[bytes],
    name: str,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] = FORMATS,
    counted: CountedFile | None = None,
) -> Image.Image:
    """A picture by its header, not decoded yet.

    Args:
        name: what messages call it.
        formats: those accepted, some of FORMATS.
        counted: what PIL is to read ``file`` through.

    Raises:
        ImageError: no picture of these formats, too many pixels, or a file made to be costly.
    """
    try:
        check_file(file, max_pixels)
        image = Image.open(counted or CountedFile(file), formats=tuple(formats))  # type: ignore[arg-type]
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: {_why_unidentified(file, formats)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the warning: under `-W error`
        raise ImageError(
            f"{name}: the picture is over PIL's own pixel limit: {error}; scale it down, "
            f"or raise PIL.Image.MAX_IMAGE_PIXELS as well as max_pixels={max_pixels}"
        ) from error
    except Exception as error:  # a parser met bytes it was not made for
        raise _unreadable(name, error) from error
    _check_size(image, name, max_pixels)
    return image


def _why_unidentified(file: IO[bytes], formats: Sequence[str]) -> str:
    file.seek(0)
    start = file.read(12)
    if not start:
        return "the image file is empty (0 bytes)"
    return f"not an image, or broken at its start: it begins with {start!r}; supported are {', '.join(formats)}"


def _unreadable(name: str, error: Exception) -> ImageError:
    cause = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)) or type(error).__name__  # no object addresses
    return ImageError(f"{name}: the image cannot be decoded (truncated or damaged?): {cause}")


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name}: a picture of {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} is {width * height} pixels, over the limit max_pixels={max_pixels}; "
            f"scale the picture down or raise the limit"
        )


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: 32-bit pixels (mode {image.mode}) have no fixed range; convert them to 8 bits")
    try:
        image.load()
        return _upright(_opaque(image), image)
    except MemoryError:
        raise
    except ImageError as error:  # too many parts between the pixels
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders raise whatever a damaged file leads them into
        raise _unreadable(name, error) from error


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):  # PIL would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey has no direct way to RGBA
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    try:
        check_directory(BytesIO(_exif(original.info)))
        orientation = original.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing about orientation; the pixels are sound
        return rgb
    method = _UPRIGHT.get(orientation)
    if method is None:
        return rgb
    upright = rgb.transpose(method)
    upright.info = {}  # the copied EXIF block would turn it again
    return upright


def _exif(info: dict[Any, Any]) -> bytes:
    """The block that PIL's ``getexif`` will read, from its byte order on."""
    block = info.get("exif")
    if block is None:
        lines = info.get("Raw profile type exif", "").split("\n")  # ImageMagick's way in PNG: hexadecimal text
        block = bytes.fromhex("".join(lines[3:]))
    return block.removeprefix(b"Exif\0\0")


def _from_tensor(tensor: Tensor) -> Image.Image:
    what = f"tensor of shape {tuple(tensor.shape)} and {tensor.dtype}"
    if tensor.ndim != 3 or 3 not in (tensor.shape[0], tensor.shape[2]):
        raise ImageError(f"cannot read an image from a {what}; {_TENSOR_CURE}")
    if tensor.dtype != torch.uint8 and not tensor.dtype.is_floating_point:
        raise ImageError(f"cannot read an image from a {what}; {_TENSOR_CURE}")
    if tensor.shape[0] == 3:
        tensor = tensor.permute(1, 2, 0)
    if tensor.dtype != torch.uint8:
        tensor = tensor.float()  # numpy has no bfloat16
    return _from_array(tensor.detach().cpu().numpy())


def _from_array(array: np.ndarray) -> Image.Image:
    what = f"array of shape {array.shape} and dtype {array.dtype}"
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"cannot read an image from an {what}; {_ARRAY_CURE}")
    if array.size == 0:
        raise ImageError(f"cannot read an image from an {what}: it has no pixels")
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype.kind != "f":
        raise ImageError(f"cannot read an image from an {what}; {_ARRAY_CURE}")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # also true of NaN
        raise ImageError(f"{what} holds values from {low:g} to {high:g}; {_ARRAY_CURE}")
    return Image.fromarray(np.rint(array * np.float32(255)).astype(np.uint8))


class ImageProcessor:
    """Turns an image source into the normalised square tensor that a CLIP tower reads.

    Args:
        size: S, the side of the result in pixels.
        aspect: "square" resizes the shorter side to S and cuts the middle out (CLIP, LLaVA v1); "pad" first fills the
            picture up to a square with the mean colour (LLaVA-1.5).
        mean: per-channel mean of RGB values in 0..1.
        std: per-channel standard deviation.
        max_pixels: the largest picture accepted; see :func:`load_image`.

    Raises:
        ConfigError: a value that cannot work.
    """

    def __init__(
        self,
        size: int,
        aspect: str = "square",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        max_pixels: int = MAX_PIXELS,
    ):
        if not isinstance(size, int) or size <= 0:
            raise ConfigError(f"image size={size!r} must be a positive number of pixels")
        if aspect not in ASPECTS:
            raise ConfigError(f"image aspect={aspect!r} is not known; choose one of {', '.join(ASPECTS)}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(f"mean={list(mean)} and std={list(std)} must hold three numbers each, std above 0")
        self.size = size
        self.aspect = aspect
        self.mean = tuple(float(x) for x in mean)
        self.std = tuple(float(x) for x in std)
        self.max_pixels = max_pixels
        self.background = tuple(int(x * 255) for x in self.mean)  # (122, 116, 104) for CLIP
        # (value / 255 - mean) / std as one multiply and one add
        self._scale = np.array([1 / (255 * s) for s in self.std], np.float32)
        self._shift = np.array([-m / s for m, s in zip(self.mean, self.std, strict=True)], np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what one picture becomes: (3, S, S)."""
        return (3, self.size, self.size)

    def __call__(self, source: ImageSource, out: Tensor | None = None) -> Tensor:
        """The picture as float32 (3, S, S), RGB, normalised.

        Args:
            source: see :func:`load_image`.
            out: a float32 CPU tensor (3, S, S) to write into, such as one row of a batch; a new one when not given.

        Raises:
            ImageError: the source cannot be used; see :func:`load_image`.
        """
        picture: Image.Image | np.ndarray
        if is_rgb(source) and 0 < source.shape[0] * source.shape[1] <= self.max_pixels:
            picture = source  # nothing to convert, nor to complain of
        else:
            picture = load_image(source, self.max_pixels)
        if out is None:
            out = torch.empty(3, self.size, self.size)
        if not self._prepare(picture, out):
            self._prepare_with_pil(picture if isinstance(picture, Image.Image) else load_image(picture), out)
        return out

    def _prepare(self, picture: Image.Image | np.ndarray, out: Tensor) -> bool:
        """Writes ``out`` through the C library; False where it is not that which does."""
        planes = out.numpy()
        if planes.shape != self.shape or planes.dtype != np.float32 or not planes.flags.c_contiguous:
            return False  # numpy writes there, or says why not
        height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
        placement = self._placement(height, width) if native.available() else None
        if placement is None:
            return False
        pixels = np.asarray(picture)
        native.prepare(pixels, out, placement, self.background, self._scale.tolist(), self._shift.tolist())
        return True

    def _placement(self, height: int, width: int) -> Placement | None:
        """What :meth:`_crop_to_square` and :meth:`_pad_to_square` do the plain way; None where that is wasteful."""
        size, short, long = self.size, min(height, width), max(height, width)
        if self.aspect == "pad":
            corner = ((long - height) // 2, (long - width) // 2)
            wasteful = _is_wasteful((width, height), long * long)
            return None if wasteful else Placement((long, long), corner, (size, size), (0, 0))
        new_long = int(size * long / short)
        if _is_wasteful((width, height), size * max(long, new_long)):
            return None
        new, start = (size, new_long), (0, (new_long - size) // 2)
        if height >= width:
            new, start = new[::-1], start[::-1]
        shrinks = height > new[0] and height - new[0] > 2 * (width - new[1])
        return Placement((height, width), (0, 0), new, start, height_first=_PICKS_ORDER and shrinks)

    def _prepare_with_pil(self, image: Image.Image, out: Tensor) -> None:
        image = self._crop_to_square(image) if self.aspect == "square" else self._pad_to_square(image)
        planes = out.numpy()  # (3, S, S), the same memory
        pixels = np.asarray(image)  # (S, S, 3) uint8
        for channel in range(3):
            np.multiply(pixels[:, :, channel], self._scale[channel], out=planes[channel])
            planes[channel] += self._shift[channel]

    def stack(self, sources: Sequence[ImageSource]) -> Tensor:
        """N pictures as one float32 batch (N, 3, S, S), each written in place; N may be 0. Raises as ``__call__``."""
        batch = torch.empty(len(sources), 3, self.size, self.size)
        for source, out in zip(sources, batch, strict=True):
            self(source, out)
        return batch

    def _crop_to_square(self, image: Image.Image) -> Image.Image:
        """The shorter side resized to S, then the middle S x S of it."""
        size, short, long = self.size, min(image.size), max(image.size)
        wide = image.width > image.height
        new_long = int(size * long / short)
        start = (new_long - size) // 2
        if _is_wasteful(image.size, size * max(long, new_long)):
            return _resize_part(image, size, new_long, (start, start + size))
        image = image.resize((new_long, size) if wide else (size, new_long), _BICUBIC)
        return image.crop((start, 0, start + size, size) if wide else (0, start, size, start + size))

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        """The picture in the middle of a square of the background colour, then that square resized to S x S."""
        long = max(image.size)
        if _is_wasteful(image.size, long * long):
            return self._pad_elongated(image)
        corner = ((long - image.width) // 2, (long - image.height) // 2)
        return _on_background(image, (long, long), corner, self.background).resize((self.size, self.size), _BICUBIC)

    def _pad_elongated(self, image: Image.Image) -> Image.Image:
        """The same, building only the strip of the square that the filter sees together with the picture."""
        size, short, long = self.size, min(image.size), max(image.size)
        wide = image.width > image.height
        offset = (long - short) // 2  # where the picture starts in the square, across its long side
        scale = long / size  # source pixels an output pixel
        reach = _BICUBIC_REACH * max(1.0, 1 / scale) + 1  # output pixels that see the picture from outside it
        first = max(0, math.floor(offset / scale - reach))
        last = min(size, math.ceil((offset + short) / scale + reach))
        low, high = _window(first * scale, last * scale, scale, long)
        if long * (high - low) > self.max_pixels:
            raise ImageError(f"a picture of {image.width}x{image.height} is too long and thin to fill up to a square")
        begin, end, offset = first * scale - low, last * scale - low, offset - low
        if wide:
            strip = _on_background(image, (long, high - low), (0, offset), self.background)
            rows = _resize_box(strip, (size, last - first), (0, begin, long, end))
            return _on_background(rows, (size, size), (0, first), self.background)
        strip = _on_background(image, (high - low, long), (offset, 0), self.background)
        columns = _resize_box(strip, (last - first, size), (begin, 0, end, long))
        return _on_background(columns, (size, size), (first, 0), self.background)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``preprocessor_config.json`` into ``directory``, in the form transformers reads."""
        pad = self.aspect == "pad"
        config: dict[str, Any] = {
            "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": int(_BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if pad:
            config["do_pad"] = True
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: str | os.PathLike[str], aspect: str | None = None) -> ImageProcessor:
        """Reads what :meth:`save`, transformers or a published CLIP directory holds.

        Args:
            directory: a folder with ``preprocessor_config.json``, or with a ``processor_config.json`` that holds the
                same under ``image_processor``, as transformers 5 writes it.
            aspect: overrides the file; a plain CLIP directory cannot say "pad".

        Raises:
            ConfigError: no such file, or it asks for something else than resize, crop or pad, and normalise.
        """
        path, config = _read_config(Path(directory))
        size = _check_config(path, config)
        mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
        return ImageProcessor(size, aspect or ("pad" if config.get("do_pad") else "square"), mean, std)


def _is_wasteful(size: tuple[int, int], pixels: int) -> bool:
    """Whether the plain way, whose largest step has ``pixels`` pixels, would compute mostly what is thrown away."""
    return max(size) > _ELONGATED * min(size) and pixels > _COSTLY


def _resize_part(image: Image.Image, new_short: int, new_long: int, part: tuple[int, int]) -> Image.Image:
    """Resizes, but computes only ``part`` (start, stop) of the new long side; the new short side whole."""
    short, long = min(image.size), max(image.size)
    scale = long / new_long  # source pixels an output pixel
    begin, end = part[0] * scale, part[1] * scale
    low, high = _window(begin, end, scale, long)
    size = part[1] - part[0]
    if image.width > image.height:
        return _resize_box(image.crop((low, 0, high, short)), (size, new_short), (begin - low, 0, end - low, short))
    return _resize_box(image.crop((0, low, short, high)), (new_short, size), (0, begin - low, short, end - low))


def _resize_box(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """The part ``box`` (left, top, right, bottom) of ``image`` resized to ``size`` (width, height).

    The filter rounds to 8 bits between its two passes, so their order shows. From version 13 Pillow picks it by the
    shapes of box and image; here it is always horizontal first, as in every Pillow before.
    """
    left, top, right, bottom = box
    image = image.resize((size[0], image.height), _BICUBIC, box=(left, 0, right, image.height))
    return image.resize(size, _BICUBIC, box=(0, top, size[0], bottom))


def _on_background(
    image: Image.Image, size: tuple[int, int], corner: tuple[int, int], background: tuple[int, ...]
) -> Image.Image:
    if image.size == size:
        return image
    canvas = Image.new("RGB", size, background)
    canvas.paste(image, corner)
    return canvas


def _window(begin: float, end: float, scale: float, length: int) -> tuple[int, int]:
    """The source pixels of 0..length that the filter looks at for the span begin..end."""
    reach = _BICUBIC_REACH * max(1.0, scale) + 1
    return max(0, math.floor(begin - reach)), min(length, math.ceil(end + reach))


def _read_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if isinstance(config, dict) and name == "processor_config.json":
            config = config.get("image_processor")
        if isinstance(config, dict):
            return path, config
    raise ConfigError(f"{folder} holds no preprocessor_config.json; copy it from the CLIP tower's directory")


def _check_config(path: Path, config: dict[str, Any]) -> int:
    """The side S that ``config`` asks for, once it is known to ask for nothing that is done differently here."""
    resample = config.get("resample", int(_BICUBIC))
    if resample != _BICUBIC:
        raise ConfigError(f"{path}: resample={resample} is not supported; only bicubic (3) is")
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not config.get(key, True):
            raise ConfigError(f"{path}: {key}=false is not supported; pictures are resized, cropped and normalised")
    if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"{path}: rescale_factor={config['rescale_factor']} is not supported; only 1/255 is")
    crop = _side(path, "crop_size", config.get("crop_size", 224))
    size = config.get("size", 224)
    if isinstance(size, dict) and "shortest_edge" not in size and not config.get("do_pad"):
        raise ConfigError(f"{path}: size={size} stretches pictures to a square; set it to {{'shortest_edge': {crop}}}")
    side = _side(path, "size", size)
    if side != crop:
        raise ConfigError(f"{path}: size={side} and crop_size={crop} differ, which is not supported")
    return side


def _side(path: Path, key: str, value: Any) -> int:
    """S from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    known = set(sides) in ({"shortest_edge"}, {"height", "width"})
    side = next(iter(sides.values()), None)
    known = known and all(x == side for x in sides.values())
    if not known or not isinstance(side, int):
        raise ConfigError(f"{path}: {key}={value} is not one square side such as 224 or {{'shortest_edge': 224}}")
    return side
