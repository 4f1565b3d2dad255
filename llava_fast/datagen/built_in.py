"""The built-in scenes as pictures with captions and boxes, written to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_fast.data.scenes import scene_at
from llava_fast.datagen.pictures import Object, Picture


def scene_pictures(count: int, seed: int) -> list[Picture]:
    """The first ``count`` scenes of the set ``seed`` in words."""
    pictures = []
    for index in range(count):
        scene, rng = scene_at(seed, index)
        objects = tuple(Object(one["category"], one["bbox"]) for one in scene.boxes())
        captions = tuple(scene.captions(rng))
        pictures.append(Picture(f"scene-{seed}-{index}", f"images/{index:06d}.png", captions, objects))
    return pictures


def draw_scenes(folder: Path, count: int, seed: int, each: Callable[[], Any] = lambda: None) -> None:
    """Draw the scenes that are not in the folder yet; ``each`` is called after every one."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = folder / f"images/{index:06d}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            scene_at(seed, index)[0].image().save(part, format="PNG")
            part.replace(path)
        each()
