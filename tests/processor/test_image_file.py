"""Files made to be costly are refused from their header; honest ones of every kind still pass."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_fast.errors import ImageError
from llava_fast.processor.image import load_image, open_image
from llava_fast.processor.image_file import MAX_PARTS, MAX_SCANS, CountedFile
from tests.realdata import real_data


def encode(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def in_jpeg(added: bytes, **options) -> bytes:
    """A JPEG with something behind its first marker."""
    data = encode("JPEG", **options)
    return data[:2] + added + data[2:]


def with_scans(number: int, between: bytes = b"") -> bytes:
    """A progressive JPEG of so many scans: its last one, over and over."""
    data = encode("JPEG", mode="L", progressive=True)
    usual, last = data.count(b"\xff\xda"), data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (between + last) * (number - usual) + data[-2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def in_png(before: bytes = b"", after: bytes = b"", pieces: int = 1 << 20, size: tuple[int, int] = (100, 100)) -> bytes:
    """A PNG of noise with chunks before and behind its pixels, which come in ``pieces``."""
    plain = encode("PNG", size)
    start, parts, at = plain.index(b"IDAT") - 4, [], plain.index(b"IDAT") - 4
    while plain[at + 4 : at + 8] == b"IDAT":
        length = int.from_bytes(plain[at : at + 4], "big")
        parts.append(plain[at + 8 : at + 8 + length])
        at += 12 + length
    data, pixels = plain[:start], b"".join(parts)
    split = b"".join(chunk(b"IDAT", pixels[i : i + pieces]) for i in range(0, len(pixels), pieces))
    return data + before + split + after + chunk(b"IEND", b"")


def in_gif(added: bytes) -> bytes:
    """A GIF with blocks before its frame."""
    data = encode("GIF", mode="P")
    frame = 13 + 3 * (2 << (data[10] & 7))
    return data[:frame] + added + data[frame:]


def directory(entries: list[tuple[int, int, int, int]], behind: bytes = b"") -> bytes:
    """A TIFF directory of (tag, type, count, value or offset)."""
    packed = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + packed + struct.pack("<L", 0) + behind


OVERLAPPING = directory([(0x9000 + i, 7, 60_000, 8) for i in range(2000)], bytes(41_000))
MANY = MAX_PARTS + 1


def tiles(width: int, height: int) -> bytes:
    """A TIFF of one grey pixel in a tile of the given size."""
    pixels = zlib.compress(bytes(width * height))
    places = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 325: len(pixels)}
    offset = 8 + 2 + 12 * (len(places) + 1) + 4
    return directory(sorted((tag, 4, 1, value) for tag, value in {**places, 324: offset}.items()), pixels)


COSTLY = {
    "scans": with_scans(MAX_SCANS + 1),
    "scans behind comments that hold an end": with_scans(MAX_SCANS + 1, segment(0xFE, b"\xff\xd9")),
    "scans behind restarts": with_scans(MAX_SCANS + 1, b"\xff\xd0\xff\x01\0"),
    "fill bytes": in_jpeg(b"\xff" * MANY),
    "junk bytes": in_jpeg(segment(0xFE, b"") + b"x" * MANY),
    "zero markers": in_jpeg(b"\xff\0" * MANY),
    "bare markers": in_jpeg(b"\xff\xf0" * MANY),
    "empty comments": in_jpeg(segment(0xFE, b"") * MANY),
    "quantisation tables": in_jpeg(segment(0xDB, (b"\0" + bytes(range(1, 65))) * 1000) * 2),
    "photoshop records": in_jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5000) * 4),
    "jpeg exif": in_jpeg(segment(0xE1, b"Exif\0\0" + OVERLAPPING)),
    "jpeg exif in two": in_jpeg(
        segment(0xE1, b"Exif\0\0" + OVERLAPPING[:30_000]) + segment(0xE1, b"Exif\0\0" + OVERLAPPING[30_000:])
    ),
    "mpo index": in_jpeg(segment(0xE2, b"MPF\0" + OVERLAPPING)),
    "png text": in_png(chunk(b"tEXt", b"a\0") * MANY),
    "png text behind": in_png(after=chunk(b"tEXt", b"a\0") * MANY),
    "png unknown": in_png(chunk(b"abCd", b"") * MANY),
    "png compressed text": in_png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 70),
    "png colour profile": in_png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 22)))),
    "png pixels byte by byte": in_png(pieces=1),
    "gif blocks": in_gif(b"\1" * MANY),
    "gif extensions": in_gif(b"\x21\xf9\4\0\0\0\0\0" * MANY),
    "gif comments": in_gif(b"\x21\xfe\1a\0" * MANY),
    "gif comment": in_gif(b"\x21\xfe" + (b"\xff" + bytes(255)) * MANY + b"\0"),
    "tiff tile": tiles(3000, 2000),
    "tiff values": directory([(0x9000 + i, 7, 60_000, 8) for i in range(2000)], bytes(41_000)),
    "bigtiff values": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 400)
    + b"".join(struct.pack("<HHQQ", 0x9000 + i, 7, 60_000, 0) for i in range(400)) + bytes(61_000),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files_are_refused(name: str):
    with pytest.raises(ImageError, match=r"scans|parts|tables|directory|tiles|text chunks|Decompressed"):
        load_image(COSTLY[name], max_pixels=1_000_000)


@pytest.mark.parametrize("name", sorted(set(COSTLY) - {"png text behind", "png pixels byte by byte"}))
def test_costly_headers_are_refused_before_anything_is_decoded(name: str):
    with pytest.raises(ImageError):
        open_image(io.BytesIO(COSTLY[name]), "it", max_pixels=1_000_000)


HONEST = {
    "scans": with_scans(MAX_SCANS),
    "scans behind the end": encode("JPEG", progressive=True) + b"\xff\xda\0\2" * 1000,
    "values that overlap a little": in_jpeg(
        segment(0xE1, b"Exif\0\0" + directory([(0x9000 + i, 7, 99, 8) for i in range(9)]))
    ),
    "scans of a baseline picture's video": encode("JPEG") + b"\xff\xda\0\2" * 1000,
    "fill bytes": in_jpeg(b"\xff" * 500),
    "a comment": in_jpeg(segment(0xFE, b"\xff\xda\0\2" * 1000)),
    "a colour profile": in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)) * 40),
    "broken exif": in_jpeg(segment(0xE1, b"Exif\0\0" + directory([(0x112, 3, 2**32 - 1, 8)]))),
    "exif beyond its end": in_jpeg(segment(0xE1, b"Exif\0\0" + directory([(274, 3, 1, 1)])[:-8] + b"\xff\xff")),
    "short exif": in_jpeg(segment(0xE1, b"Exif\0\0II")),
    "png in small pieces": in_png(pieces=200, size=(1000, 400)),
    "png with texts": in_png(chunk(b"tEXt", b"a\0b") * 100, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 1000))),
    "png with broken exif": in_png(chunk(b"eXIf", OVERLAPPING)),
    "gif with a comment": in_gif(b"\x21\xfe" + (b"\xff" + b"x" * 255) * 1000 + b"\0"),
    "tiff of tiles": tiles(1000, 1000),
    **{kind: encode(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")},
    **{f"tiff {kind}": encode("TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL, of what is broken in an EXIF block
@pytest.mark.parametrize("name", HONEST)
def test_honest_files_pass(name: str):
    picture = load_image(HONEST[name], max_pixels=1_000_000)
    assert picture.size == Image.open(io.BytesIO(HONEST[name])).size
    assert open_image(io.BytesIO(HONEST[name]), "it").size == picture.size


@pytest.mark.parametrize("entries", [1, 2000])
def test_an_exif_block_that_is_not_sound_turns_nothing(entries: int):
    values = [(0x9000 + i, 7, 60_000, 8) for i in range(entries)]
    block = directory([(274, 3, 1, 6), *values], bytes(60_000))
    turned = load_image(in_png(chunk(b"eXIf", block), size=(100, 50))).size
    assert turned == ((50, 100) if entries == 1 else (100, 50))
    text = f"\nexif\n{len(block)}\n{block.hex()}"
    profile = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode()))
    assert load_image(in_png(profile, size=(100, 50))).size == turned


def test_several_pictures_in_one_jpeg():
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "MPO", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(buffer.getvalue()))[5, 5].argmax() == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_alone_is_decoded(kind: str):
    frames = [Image.new("RGB", (40, 30), (50 * i, 0, 0)) for i in range(5)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(load_image(buffer.getvalue())).max() == 0


def test_formats_can_be_narrowed():
    with pytest.raises(ImageError, match="supported are PNG, GIF"):
        open_image(io.BytesIO(encode("JPEG")), "it", formats=("PNG", "GIF"))
    with pytest.raises(ImageError, match="not an image"):
        open_image(io.BytesIO(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "it")


def test_reads_are_counted_anew_for_the_pixels():
    file = CountedFile(io.BytesIO(bytes(1280)))
    for _ in range(MAX_PARTS):
        file.read(1)
    with pytest.raises(ImageError):
        file.read(1)
    file.allow_pixels()
    for _ in range(MAX_PARTS + 10):
        file.read(1)
    with pytest.raises(ImageError):
        file.read(1)


def test_real_pictures_pass():
    paths = [*real_data("photos").iterdir(), *sorted(real_data("scienceqa", "images").rglob("*.png"))[:50]]
    paths += sorted(real_data("llava_pretrain", "images").rglob("*.jpg"))[:200]
    for path in paths:
        with path.open("rb") as file:
            open_image(file, path.name)
