"""Tensors on disk: listed without reading, read one by one through memory maps, written without a second copy."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_fast.errors import CheckpointError

# A mapped page counts as resident memory once it was touched. A map is opened anew after this many bytes, which drops
# its pages, so that reading a checkpoint needs the model's memory and little more.
REMAP_BYTES = 64 << 20
SHARD_BYTES = 5_000_000_000

# The safetensors names of what we write (https://github.com/huggingface/safetensors, "Format").
_DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
}
_BAD_BIN = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, struct.error)
_WEIGHT_FILE = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is read; ``name`` is as its file spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFiles:
    """The tensors of a set of files: safetensors, or ``.bin`` read with ``torch.load(weights_only=True)``.

    Args:
        files: names must not repeat between them.

    Attributes:
        entries: every tensor by name, in the order in which the files hold them.

    Raises:
        CheckpointError: a file is truncated or is not what its ending says; a name stands in two files.
    """

    def __init__(self, files: Iterable[Path]):
        self.entries: dict[str, Entry] = {}
        self._file: Path | None = None  # the file that is open
        self._tensor: Callable[[str], Tensor] = _nothing_open
        self._bytes_read = 0
        for file in files:
            for name, entry in _list_tensors(file):
                if name in self.entries:
                    raise CheckpointError(
                        f"{name} stands in both {self.entries[name].file} and {file}; remove the file that is not part "
                        f"of the checkpoint"
                    )
                self.entries[name] = entry

    @classmethod
    def find(cls, directory: Path) -> TensorFiles:
        """The weights of a directory: see :func:`weight_files`."""
        return cls(weight_files(directory))

    def read(self, name: str) -> Tensor:
        """One tensor on the host, a view of the mapped file: copy what is to last, then drop it."""
        entry = self.entries[name]
        if entry.file != self._file or (self._bytes_read > REMAP_BYTES and zipped(entry.file)):
            self._file, self._bytes_read = None, 0
            self._tensor = _nothing_open  # the old map goes before the new one is made
            self._tensor = _open(entry.file)
            self._file = entry.file
        self._bytes_read += entry.nbytes
        with _named(entry.file):
            return self._tensor(name)

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors called ``names`` (default all) in file order, each valid until the next is asked for."""
        wanted = None if names is None else set(names)
        for name in self.entries:
            if wanted is None or name in wanted:
                yield name, self.read(name)
        self._file, self._tensor = None, _nothing_open


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights, looked for in this order: ``model.safetensors``, its index with
    shards, ``pytorch_model.bin``, its index with shards, any ``*.safetensors``.

    Raises:
        CheckpointError: there are none, or shards that the index names are missing.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (directory / stem).is_file():
            return [directory / stem]
        index = directory / f"{stem}.index.json"
        if index.is_file():
            return _indexed(index)
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(
            f"{directory} holds no weights; looked for model.safetensors, pytorch_model.bin, their .index.json and "
            f"any *.safetensors"
        )
    return found


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; the file is damaged: download or save it again")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(names)} shards that {index} names are missing: {shorten(absent)}; "
            f"finish the download"
        )
    return [index.parent / name for name in names]


def _list_tensors(file: Path) -> Iterator[tuple[str, Entry]]:
    if file.suffix == ".safetensors":
        with _named(file), safe_open(file, framework="pt") as handle:
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                yield name, Entry(name, tuple(part.get_shape()), _torch_dtype(part.get_dtype()), file)
    else:
        for name, tensor in _load_bin(file).items():
            yield name, Entry(name, tuple(tensor.shape), tensor.dtype, file)


def _open(file: Path) -> Callable[[str], Tensor]:
    if file.suffix == ".safetensors":
        with _named(file):
            return safe_open(file, framework="pt").get_tensor
    tensors = _load_bin(file)
    # What is not mapped lies in memory and is given up tensor by tensor.
    return tensors.__getitem__ if zipped(file) else tensors.pop


def _load_bin(file: Path) -> dict[str, Tensor]:
    with _named(file):
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped(file))
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{file} is not a table of tensors by name; expected a state dict")
    return dict(loaded)


def zipped(file: Path) -> bool:
    """Whether ``file`` can be mapped: everything but a ``.bin`` from before torch 1.6, which is not a zip archive."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _nothing_open(name: str) -> Tensor:
    raise AssertionError(f"no file is open for {name}")


class _named:
    """Turns what the readers raise over a damaged file into a CheckpointError that names the file."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{self.file} does not exist") from error
        if isinstance(error, (SafetensorError, *_BAD_BIN)):
            size = self.file.stat().st_size
            raise CheckpointError(
                f"{self.file} ({size} bytes) cannot be read: {_first_line(error)}; it is truncated or damaged, so "
                f"download or save it again"
            ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no detail'}".splitlines()[0][:200]


def _torch_dtype(code: str) -> torch.dtype:
    names = {code: dtype for dtype, code in _DTYPE_CODES.items()}
    # Other types are listed so that an error can name the tensor; none of them fits a model.
    return names.get(code) or {"F8_E5M2": torch.float8_e5m2}.get(code, torch.uint8)


@dataclass(frozen=True)
class Made:
    """A tensor that is worked out only when it is written, so that no two such need exist at once.

    Attributes:
        like: its shape and dtype, on the meta device.
        make: works it out.
    """

    like: Tensor
    make: Callable[[], Tensor]


def form_of(tensor: Tensor | Made) -> Tensor:
    """A tensor, maybe without content, of the shape and dtype of ``tensor``."""
    return tensor.like if isinstance(tensor, Made) else tensor


def write_tensors(
    directory: Path, tensors: Mapping[str, Tensor | Made], *, stem: str = "model", shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``{stem}.safetensors``, or shards with an index as transformers names them.

    All files are complete on disk under temporary names before the first takes its final one, so an interrupted save
    leaves what was there; weight files of an earlier save that the new one does not replace are removed.

    Args:
        directory: made when it does not exist.
        tensors: on any device, float, int32 or int64; views are written without a copy of the whole.
        stem: what the files are called.
        shard_bytes: largest size of a file; a tensor that is larger stands alone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    files = [f"{stem}.safetensors"]
    if len(shards) > 1:
        files = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    writes: dict[str, Callable[[Path], None]] = {
        file: lambda path, names=names: _write_safetensors(path, {name: tensors[name] for name in names})  # type: ignore[misc]
        for file, names in zip(files, shards, strict=True)
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(form_of(t).nbytes for t in tensors.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        writes[f"{stem}.safetensors.index.json"] = lambda path: _write_text(path, _dumps(index))
    replace_files(directory, writes)
    for old in directory.iterdir():
        if stem == "model" and _WEIGHT_FILE.fullmatch(old.name) and old.name not in writes:
            old.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, whole or not at all; its directory is made when it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files(path.parent, {path.name: lambda target: _write_text(target, _dumps(content))})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint directory needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def replace_files(directory: Path, writes: dict[str, Callable[[Path], None]]) -> None:
    """Write several files under temporary names in ``directory``, flush them to disk, then give all their names."""
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in writes}
    try:
        for name, write in writes.items():
            write(temporary[name])
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(directory, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def shorten(names: list[str], limit: int = 20) -> str:
    """``names`` in one line, the first ``limit`` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _shards(tensors: Mapping[str, Tensor | Made], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = form_of(tensor).nbytes
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor | Made]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # The widest first, so that each begins at a multiple of its own width.
    tensors = dict(sorted(tensors.items(), key=lambda named: -form_of(named[1]).itemsize))
    for name, like in ((name, form_of(tensor)) for name, tensor in tensors.items()):
        if like.dtype not in _DTYPE_CODES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPE_CODES)
            raise CheckpointError(f"{name} is {like.dtype}, which is not written; {known} are")
        header[name] = {
            "dtype": _DTYPE_CODES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [offset, offset + like.nbytes],
        }
        offset += like.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            whole = tensor.make() if isinstance(tensor, Made) else tensor
            out.write(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        _flush(out)


def _write_text(path: Path, text: str) -> None:
    with path.open("wb") as out:
        out.write(text.encode())
        _flush(out)


def _flush(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


def _dumps(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
