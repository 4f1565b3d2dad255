"""Picture files that would cost far more to read than their bytes and pixels let expect.

PIL judges a picture by the pixels that its header promises. What passes that judgement and is stopped here: a
progressive JPEG of 30 kB with a thousand scans, each of which goes over all pixels; headers of a million empty parts,
which PIL walks through in Python; EXIF blocks whose entries all point to the same bytes, which PIL before 13 copies for
each; tiles far larger than their picture. What is merely damaged is left to the decoders, which say so.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO
from typing import IO

from llava_fast.errors import ImageError

MAX_SCANS = 64  # of a JPEG; ten are usual
MAX_PARTS = 16_384  # segments or entries of a header; some dozens are usual
MAX_TABLES = 1 << 16  # bytes of a JPEG's tables; two thousand are usual
MAX_VALUES = 4 << 20  # bytes of a directory's values, in files smaller than that

_JPEG_START = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # 0xff00 is a byte of a scan, 0xffd0 to 0xffd7 its restarts
_BARE = {0x01, 0xC8, 0xD8, *range(0xF0, 0xFE)}  # markers without length and content
_SCAN, _END, _HUFFMAN, _QUANTISATION, _EXIF, _PICTURES, _PHOTOSHOP = 0xDA, 0xD9, 0xC4, 0xDB, 0xE1, 0xE2, 0xED
_FRAMES = {*range(0xC0, 0xD0)} - {_HUFFMAN, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1, 0xC9}  # each component whole in one scan
_UNIT = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # TIFF types' bytes
_TILE_SIDES = (322, 323)  # tags TileWidth and TileLength


class CountedFile:
    """A file that can be read from so many times, and from then on raises ImageError.

    PIL's parsers read a few bytes for each part of a file: what they do in Python is bounded with the reads.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)
        self._left = MAX_PARTS

    def allow_pixels(self) -> None:
        """From here on as many reads as parts of 128 bytes; those of PNG have 8 kB."""
        self._left = MAX_PARTS + self._size // 128

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise _too_many_parts()
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def check_file(file: IO[bytes], max_pixels: int) -> None:
    """Judges a JPEG or TIFF before PIL sees it; other files pass. ``file`` is left at its beginning.

    Raises:
        ImageError: reading it would cost out of all proportion.
    """
    file.seek(0)
    start = file.read(3)
    file.seek(0)
    if start == _JPEG_START:
        _check_jpeg(file.read())
    elif start[:2] in (b"II", b"MM"):
        check_directory(file, max_pixels)
    file.seek(0)


def _check_jpeg(data: bytes) -> None:
    """Goes from marker to marker as PIL and libjpeg do: junk between segments is passed over."""
    at, scans, tables, records, components, several = 2, 0, 0, 0, 0, False
    exif = bytearray()
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None or (scans and data[found.end() - 1] == _END):
            break
        marker, at = data[found.end() - 1], found.end()
        if marker in _BARE or marker == _END:
            continue
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        content, at = data[at + 2 : end], end
        if marker == _SCAN:
            scans += 1
            if scans == 1 and not several and content[:1] == bytes([components]):
                break  # the only one: the decoder stops behind it
            if scans > MAX_SCANS:
                raise ImageError(f"it is a JPEG of more than {MAX_SCANS} scans; save it again as an ordinary one")
        elif marker in _FRAMES and len(content) > 5:
            components, several = content[5], marker not in _SEQUENTIAL
        elif marker in (_HUFFMAN, _QUANTISATION):
            tables += len(content)
        elif marker == _EXIF and content.startswith(b"Exif\0\0"):
            exif += content[6:]  # PIL takes several for one
        elif marker == _PICTURES and content.startswith(b"MPF\0"):
            check_directory(BytesIO(content[4:]))
        elif marker == _PHOTOSHOP:
            records += content.count(b"8BIM")
    else:
        raise _too_many_parts()
    if tables > MAX_TABLES or records > MAX_PARTS:
        raise ImageError(f"its file holds {tables} bytes of tables and {records} records; save the picture again")
    check_directory(BytesIO(exif))


def check_directory(file: IO[bytes], max_pixels: int | None = None) -> None:
    """The first directory of a TIFF file, or of an EXIF block, which is written the same way.

    Args:
        file: from the byte order on.
        max_pixels: of a tile; None where there are none.

    Raises:
        ImageError: too many entries, far more bytes of values than there are, or a tile over ``max_pixels``.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return
    big = head[2] == 43  # BigTIFF, as PIL tells it
    layout, number, inline = (order + "HHQQ", order + "Q", 8) if big else (order + "HHLL", order + "L", 4)
    (offset,) = struct.unpack_from(number, head, 8 if big else 4)
    file.seek(min(offset, size))
    entries = int.from_bytes(file.read(8 if big else 2), "little" if order == "<" else "big")
    raw = file.read(min(entries, MAX_PARTS + 1) * struct.calcsize(layout))
    raw = raw[: len(raw) // struct.calcsize(layout) * struct.calcsize(layout)]
    if len(raw) > MAX_PARTS * struct.calcsize(layout):
        raise _too_many_parts()
    total, tile = 0, 1
    for tag, kind, count, value in struct.iter_unpack(layout, raw):
        length = count * _UNIT.get(kind, 0)
        if inline < length <= size - value:  # what reaches beyond the end is not read
            total += length
        if tag in _TILE_SIDES and count == 1:
            tile *= _number(kind, value, order, inline)
    if total > max(size, MAX_VALUES):
        raise ImageError(f"its directory tells of {total} bytes, and it has {size}; save the picture again")
    if max_pixels is not None and tile > max_pixels:
        raise ImageError(f"it is laid out in tiles of {tile} pixels, over the limit max_pixels={max_pixels}")


def _number(kind: int, value: int, order: str, inline: int) -> int:
    """The number that stands in the place of an offset, left-aligned, in the bytes of its type."""
    used, there = _UNIT.get(kind, 0), value.to_bytes(inline, "little" if order == "<" else "big")
    return int.from_bytes(there[:used], "little" if order == "<" else "big")


def _too_many_parts() -> ImageError:
    return ImageError(f"its file has more than {MAX_PARTS} parts; save the picture again")
