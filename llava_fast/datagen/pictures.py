"""Pictures as a language-only teacher knows them: captions, and the boxes of objects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError

Box = tuple[float, float, float, float]
BOX_FORMS = ("shares", "xyxy", "xywh")


@dataclass(frozen=True)
class Object:
    """An object of a picture. Attributes: box: (left, top, right, bottom) as shares of width and height, 0 to 1."""

    category: str
    box: Box


@dataclass(frozen=True)
class Picture:
    """A picture in words. Attributes: image: its file, relative to the folder of images."""

    id: str
    image: str
    captions: tuple[str, ...]
    objects: tuple[Object, ...] = ()


def normalise(box: Iterable[float], form: str, width: float, height: float) -> Box:
    """A box in shares of the picture, three places, as in the paper's contexts.

    Args:
        box: four numbers. form: "xyxy" (left, top, right, bottom) or "xywh" (left, top, width, height), in pixels.
        width, height: of the picture in pixels.
    """
    left, top, right, bottom = box
    if form == "xywh":
        right, bottom = left + right, top + bottom
    values = (left / width, top / height, right / width, bottom / height)
    left, top, right, bottom = (round(min(1.0, max(0.0, value)), 3) for value in values)
    return left, top, right, bottom


def read_pictures(path: Path, form: str = "shares") -> Iterator[Picture]:
    """Pictures of a JSON array or a JSONL file, one after the other.

    A row is ``{"id", "image", "captions": [text, ...]}`` (or ``"caption"``), with the objects as ``"instances"``,
    ``"objects"`` or ``"boxes"``: ``[{"category", "bbox": [4 numbers]}, ...]``.

    Args:
        form: of the boxes: "shares" of the picture, or pixels as "xyxy" or "xywh"; pixels need "width" and "height"
            in every row.

    Raises:
        ConfigError: the file cannot be read, or a row is no picture; the message names the row.
    """
    for number, row in enumerate(rows(path), 1):
        try:
            yield _picture(row, form)
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{path}, row {number}: {what}; a row is {{'image', 'captions': [text, ...], 'instances': "
                "[{'category', 'bbox'}, ...]}, boxes in shares of the picture unless --boxes says otherwise"
            ) from error


def rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON array or of JSON lines.

    Raises:
        ConfigError: the file cannot be read or is neither.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            if first == "[":
                yield from json.load(file)
            else:
                yield from (json.loads(line) for line in file if not line.isspace())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a JSON or JSONL file") from error
    except ValueError as error:
        raise ConfigError(f"{path} is neither a JSON array nor JSON lines: {error}") from error


def as_row(picture: Picture) -> dict[str, Any]:
    """What ``read_pictures`` reads."""
    objects = [{"category": one.category, "bbox": list(one.box)} for one in picture.objects]
    return {"id": picture.id, "image": picture.image, "captions": list(picture.captions), "instances": objects}


def _picture(row: dict[str, Any], form: str) -> Picture:
    captions = row["captions"] if "captions" in row else [row["caption"]]
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"'captions' is no list of texts: {str(captions)[:60]}")
    captions = [" ".join(c.split()) for c in captions if c.strip()]
    if not captions:
        raise ValueError("a picture without a caption")
    found: list[Any] = next((row[name] for name in ("instances", "objects", "boxes") if name in row), [])
    objects = tuple(Object(str(one["category"]), _box(one["bbox"], form, row)) for one in found)
    return Picture(str(row.get("id", row["image"])), str(row["image"]), tuple(captions), objects)


def _box(box: list[float], form: str, row: dict[str, Any]) -> Box:
    if len(box) != 4:
        raise ValueError(f"a box of {len(box)} numbers: {box}")
    if form == "shares":
        if not all(0 <= value <= 1 for value in box):
            raise ValueError(f"the box {box} is not in shares of the picture; say --boxes xyxy or xywh")
        return normalise(box, "xyxy", 1, 1)
    return normalise(box, form, row["width"], row["height"])
