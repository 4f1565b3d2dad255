"""COCO's annotation files: ``captions_*.json`` and ``instances_*.json`` as they are published."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from llava_fast.datagen.pictures import Object, Picture, normalise
from llava_fast.errors import ConfigError


def read_coco(captions: Path, instances: Path | None = None, *, crowds: bool = False) -> list[Picture]:
    """The pictures that have a caption, by id, with their captions and objects in the order of annotation.

    Args:
        captions: ``captions_train2017.json``, for instance.
        instances: the boxes of the same pictures; without it pictures have none.
        crowds: keep the boxes of groups (``iscrowd``), whose category names one of many.

    Raises:
        ConfigError: a file cannot be read or is no such file.
    """
    told = _read(captions, "captions")
    texts: dict[int, list[str]] = defaultdict(list)
    for one in told["annotations"]:
        if one["caption"].strip():
            texts[one["image_id"]].append(" ".join(one["caption"].split()))
    objects = _objects(_read(instances, "instances"), crowds) if instances else {}
    images = {image["id"]: image["file_name"] for image in told["images"]}
    return [
        Picture(f"{number:012d}", images[number], tuple(texts[number]), tuple(objects.get(number, ())))
        for number in sorted(texts)
        if number in images
    ]


def _objects(told: dict[str, Any], crowds: bool) -> dict[int, list[Object]]:
    names = {category["id"]: category["name"] for category in told["categories"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in told["images"]}
    found: dict[int, list[Object]] = defaultdict(list)
    for one in told["annotations"]:
        if crowds or not one.get("iscrowd"):
            box = normalise(one["bbox"], "xywh", *sizes[one["image_id"]])
            found[one["image_id"]].append(Object(names[one["category_id"]], box))
    return found


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        sample = content["annotations"][0]
        assert "images" in content and ("caption" in sample if kind == "captions" else "bbox" in sample)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give COCO's {kind}_*.json") from error
    except (ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise ConfigError(f"{path} is no {kind} file of COCO; give {kind}_train2017.json, for instance") from error
    return content
