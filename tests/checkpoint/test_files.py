"""Files: damage is named, saves are whole or not at all, what is written is what safetensors reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_fast.checkpoint import files
from llava_fast.checkpoint.files import TensorFiles, read_json, weight_files, write_tensors
from llava_fast.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.randn(5).bfloat16(),
    "c": torch.randn(2, 3, 2, 2).half(),
    "d": torch.tensor(2.5),
    "e": torch.empty(0, 4),
}


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    view = torch.arange(24.0).reshape(4, 6)
    write_tensors(tmp_path, TENSORS | {"rows": view[1:3], "columns": view[:, ::2]})
    read = load_file(tmp_path / "model.safetensors")
    expected = TENSORS | {"rows": view[1:3], "columns": view[:, ::2]}
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_index_is_as_transformers_writes_it(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, shard_bytes=50)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert sorted(f.name for f in weight_files(tmp_path)) == sorted(set(index["weight_map"].values()))


def test_listing_and_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REMAP_BYTES", 20)  # several maps within this small file
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(TENSORS, tmp_path / "new.bin")
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file in ("model.safetensors", "new.bin", "old.bin"):
        reader = TensorFiles([tmp_path / file])
        assert {n: (e.shape, e.dtype) for n, e in reader.entries.items()} == {
            n: (tuple(t.shape), t.dtype) for n, t in TENSORS.items()
        }
        seen = {name: tensor.clone() for name, tensor in reader.stream()}
        assert seen.keys() == TENSORS.keys()
        assert all(torch.equal(seen[n], t) for n, t in TENSORS.items())
        assert [n for n, _ in reader.stream(["b", "c"])] == [n for n in reader.entries if n in "bc"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, name: str, keep: float) -> None:
    tensors = {f"t{i}": torch.randn(40, 40) for i in range(10)}
    file = tmp_path / ("pytorch_model.bin" if name == "legacy" else name)
    if name == "model.safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=name != "legacy")
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=str(file)):
        list(TensorFiles.find(tmp_path).stream())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_of_another_kind_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(CheckpointError, match=name):
        TensorFiles.find(tmp_path)


def test_code_in_a_bin_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        TensorFiles.find(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        read_json(tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"1 of 1 shards .* missing: model-1\.safetensors"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_')
    with pytest.raises(CheckpointError, match="not JSON"):
        weight_files(tmp_path)


def test_one_name_in_two_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors and .*y\.safetensors"):
        TensorFiles.find(tmp_path)


def test_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file fails halfway: neither it nor the first takes its final name."""
    write_tensors(tmp_path, TENSORS, shard_bytes=50)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert len(before) > 2
    flushed = []

    def fail_on_the_second(out) -> None:
        flushed.append(out.name)
        if len(flushed) == 2:
            raise OSError("no space left")

    monkeypatch.setattr(files, "_flush", fail_on_the_second)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(tmp_path, {n: t + 1 for n, t in TENSORS.items()}, shard_bytes=50)
    assert len(flushed) == 2
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_other_files_stay(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "mm_projector.bin", "optimizer.bin"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "pytorch_model.bin").write_text("of an earlier save")
    write_tensors(tmp_path, TENSORS)
    assert {f.name for f in tmp_path.iterdir()} == {
        "tokenizer.model",
        "mm_projector.bin",
        "optimizer.bin",
        "model.safetensors",
    }
