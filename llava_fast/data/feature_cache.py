"""The frozen tower's features on disk, for runs of several epochs: worked out once, mapped into memory afterwards.

A cache is two files, ``KEY.features`` (images, rows, C) and ``KEY.digests`` (images, 16 bytes), where KEY is a hash of
the tower's weights, the preprocessing, the dtype and every picture's content: what would change a feature changes KEY.
The second file is written last, and both are renamed when they are whole: a run that dies leaves nothing under the
names. Runs that want the same cache wait for one another at ``KEY.lock``, which a dying process gives up.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llava_fast.checkpoint.llama import dtype_code
from llava_fast.data.loader import SampleSource
from llava_fast.errors import ConfigError, ImageError
from llava_fast.model import Llava
from llava_fast.processor import Processor
from llava_fast.processor.image import ImageProcessor, load_image

AT_ONCE = 32  # pictures that go through the tower together
DIGEST = 16  # bytes
UNREADABLE = b""


class CachedFeatures:
    """What stands in a processor in place of its :class:`ImageProcessor`: a picture's features instead of its pixels.

    Args:
        image: the processor of pictures that are not in the cache, which says what is wrong with them.
        features: the file, (images, rows, C).
        shape: (rows, C).
        dtype: of the file, bfloat16 or float32.
        digests: row of each picture by its digest.
    """

    def __init__(
        self, image: ImageProcessor, features: Path, shape: tuple[int, int], dtype: torch.dtype, digests: list[bytes]
    ):
        self.image, self.features, self.shape, self.dtype = image, features, shape, dtype
        self.rows = {digest: row for row, digest in enumerate(digests)}
        self._map: Tensor | None = None  # opened by each process for itself

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_map": None}

    def __call__(self, source: Any, out: Tensor | None = None) -> Tensor:
        """(rows, C) of a picture.

        Raises:
            ImageError: the picture cannot be read, or has changed since the cache was made.
        """
        row = self.rows.get(digest_of(source))
        if row is None:
            self.image(source)  # says why, where it cannot be read
            raise ImageError("the picture has changed since the feature cache was made; start the run again")
        if self._map is None:
            count = len(self.rows) * self.shape[0] * self.shape[1]
            flat = torch.from_file(str(self.features), shared=False, size=count, dtype=self.dtype)
            self._map = flat.view(len(self.rows), *self.shape)
        found = self._map[row]
        return found.clone() if out is None else out.copy_(found)

    @property
    def size(self) -> int:
        return self.image.size


def cached_processor(
    processor: Processor, model: Llava, samples: SampleSource, folder: Path, dtype: torch.dtype
) -> Processor:
    """A copy of ``processor`` whose batches hold features of ``samples``' pictures, made first where there are none.

    Args:
        processor: the model's.
        model: its tower is frozen.
        samples: whose pictures are to be in the cache; what cannot be read is left out.
        folder: of the cache, made when it does not exist.
        dtype: bfloat16, or float32 to keep the features of a model that computes in it as they are.

    Raises:
        ConfigError: the disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = pictures(samples)
    if not sources:
        return processor
    key = key_of(model, processor.image, dtype, sorted(sources))
    features, digests = files = folder / f"{key}.features", folder / f"{key}.digests"
    if not digests.exists():
        with (folder / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process is no more
            if not digests.exists():  # nobody has made it meanwhile
                _make(model, processor.image, samples, sources, files, dtype)
    flat = digests.read_bytes()
    known = [flat[i : i + DIGEST] for i in range(0, len(flat), DIGEST)]
    if not known:
        return processor
    changed = copy(processor)
    changed.image = CachedFeatures(processor.image, features, _shape(model), dtype, known)  # type: ignore[assignment]
    return changed


def pictures(samples: SampleSource) -> dict[bytes, tuple[int, int]]:
    """Every picture of ``samples`` by the digest of its content: its sample, and its place there."""
    found: dict[bytes, tuple[int, int]] = {}
    for index in tqdm(range(len(samples)), desc="hashing pictures", unit="sample", leave=False, delay=2):
        for place, source in enumerate(_pictures_of(samples[index])):
            try:
                digest = digest_of(source)
            except ImageError:
                continue
            if digest != UNREADABLE:
                found.setdefault(digest, (index, place))
    return found


def _pictures_of(sample: dict[str, Any]) -> list[Any]:
    image = sample.get("image")
    return list(image) if isinstance(image, list | tuple) else [] if image is None else [image]


def digest_of(source: Any) -> bytes:
    """16 bytes that tell pictures apart by content: of a file's bytes, or of decoded pixels."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    if isinstance(source, str | Path):
        try:
            digest.update(Path(source).read_bytes())
        except OSError:
            return UNREADABLE  # in no cache: the image processor says what is wrong
    elif isinstance(source, bytes):
        digest.update(source)
    else:
        image = load_image(source)
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.digest()


def key_of(model: Llava, image: ImageProcessor, dtype: torch.dtype, digests: list[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST)
    config = model.config
    digest.update(repr((config.vision, config.select_layer, config.select_feature, model.dtype, dtype)).encode())
    digest.update(repr(sorted((name, np.asarray(value).tolist()) for name, value in vars(image).items())).encode())
    for name, weight in model.vision_tower.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for one in digests:
        digest.update(one)
    return digest.hexdigest()


@torch.no_grad()
def _make(
    model: Llava,
    image: ImageProcessor,
    samples: SampleSource,
    sources: dict[bytes, tuple[int, int]],
    files: tuple[Path, Path],
    dtype: torch.dtype,
) -> None:
    """Write both files, under other names first. Called by one process at a time."""
    shape = _shape(model)
    size = len(sources) * shape[0] * shape[1] * dtype.itemsize
    free = shutil.disk_usage(files[0].parent).free
    print(
        f"feature cache: {len(sources):,} pictures x {shape[0]} x {shape[1]} in {dtype_code(dtype)} = "
        f"{size / 1e9:,.2f} GB in {files[0].parent} ({free / 1e9:,.1f} GB free)"
    )
    if size > free:
        raise ConfigError(
            f"the feature cache needs {size / 1e9:,.2f} GB and {files[0].parent} has {free / 1e9:,.2f} GB free; give "
            f"another --feature-cache, or leave it out"
        )
    parts = [file.with_name(f".{file.name}.part") for file in files]
    kept: list[bytes] = []
    with parts[0].open("wb") as out, tqdm(total=len(sources), desc="tower", unit="picture", delay=2) as bar:
        for some in _batches(list(sources.items())):
            digests, pixels = _read(samples, image, some)
            if digests:
                features = model.vision_tower(torch.stack(pixels).to(model.device, model.dtype))
                out.write(features.to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes())
            kept += digests
            bar.update(len(some))
        out.flush()
        os.fsync(out.fileno())
    with parts[1].open("wb") as out:
        out.write(b"".join(kept))
        out.flush()
        os.fsync(out.fileno())
    for part, file in zip(parts, files, strict=True):  # the digests last: where they are, all is
        os.replace(part, file)


def _read(
    samples: SampleSource, image: ImageProcessor, some: list[tuple[bytes, tuple[int, int]]]
) -> tuple[list[bytes], list[Tensor]]:
    """The pixels (3, S, S) of those pictures that can be read, and their digests."""
    digests, pixels = [], []
    for digest, (index, place) in some:
        try:
            pixels.append(image(_pictures_of(samples[index])[place]))
            digests.append(digest)
        except ImageError:
            continue
    return digests, pixels


def _shape(model: Llava) -> tuple[int, int]:
    return model.config.tokens_per_image, model.config.vision.hidden_size


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    for i in range(0, len(items), AT_ONCE):
        yield items[i : i + AT_ONCE]
