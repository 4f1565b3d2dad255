"""The feature cache: the same losses, made once and safely, refused where there is no room."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import llava_fast as lf
from llava_fast.data import feature_cache
from llava_fast.data.feature_cache import cached_processor
from llava_fast.data.scenes import Scenes, write
from llava_fast.errors import ConfigError, ImageError
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import PARTS

SCENES = Scenes(40, 5)


def model_and_processor(dtype: torch.dtype = torch.float32) -> tuple[lf.Llava, Processor]:
    model = lf.Llava(lf.ModelConfig.preset("tiny"), seed=1, dtype=dtype)
    return model, Processor.from_config(model.config, Tokenizer.load(PARTS / "decoder"))


def listing(folder: Path) -> list[str]:
    return sorted(file.suffix for file in folder.iterdir())


@pytest.mark.parametrize("kept, exact", [(torch.float32, True), (torch.bfloat16, False)])
def test_features_are_the_towers(tmp_path: Path, kept: torch.dtype, exact: bool) -> None:
    model, processor = model_and_processor()
    cached = cached_processor(processor, model, SCENES, tmp_path, kept)
    batch, plain = cached.pack(list(SCENES)), processor.pack(list(SCENES))
    assert batch.pixel_values.shape == (plain.num_images, 9, 128)
    with torch.no_grad():
        found, expected = model.image_features(batch.pixel_values), model.image_features(plain.pixel_values)
        losses = model.loss(batch).item(), model.loss(plain).item()
    torch.testing.assert_close(found, expected, atol=1e-5 if exact else 2e-2, rtol=1e-5 if exact else 2**-8)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if exact else 2e-3)
    size = len(feature_cache.pictures(SCENES)) * 9 * 128 * kept.itemsize
    assert [f.stat().st_size for f in tmp_path.glob("*.features")] == [size]


def test_a_bfloat16_models_features_are_kept_as_they_are(tmp_path: Path) -> None:
    model, processor = model_and_processor(torch.bfloat16)
    cached = cached_processor(processor, model, SCENES, tmp_path, torch.bfloat16)
    sample = [SCENES[0]]
    with torch.no_grad():
        alone = model.image_features(processor.pack(sample).pixel_values)
    torch.testing.assert_close(cached.pack(sample).pixel_values.bfloat16(), alone, atol=2e-2, rtol=2**-7)


def test_made_once_and_anew_when_anything_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = model_and_processor()
    made = []
    honest = feature_cache._make
    monkeypatch.setattr(feature_cache, "_make", lambda *a: (made.append(1), honest(*a)))
    for _ in range(2):
        cached_processor(processor, model, SCENES, tmp_path, torch.float32)
    assert len(made) == 1
    cached_processor(processor, model, SCENES, tmp_path, torch.bfloat16)
    cached_processor(processor, model, Scenes(40, 6), tmp_path, torch.float32)
    model.vision_tower.layers[0].fc1.bias.data[3] += 1e-3
    cached_processor(processor, model, SCENES, tmp_path, torch.float32)
    processor.image.aspect = "pad" if processor.image.aspect == "square" else "square"
    cached_processor(processor, model, SCENES, tmp_path, torch.float32)
    assert len(made) == 5


def test_size_is_printed_and_refused_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = model_and_processor()
    count = len(feature_cache.pictures(SCENES))
    need = count * 9 * 128 * 2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(ConfigError, match=r"the feature cache needs 0\.00 GB .* give another --feature-cache"):
        cached_processor(processor, model, SCENES, tmp_path, torch.bfloat16)
    assert f"feature cache: {count} pictures x 9 x 128 in bfloat16" in capsys.readouterr().out
    assert listing(tmp_path) == [".lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    cached_processor(processor, model, SCENES, tmp_path, torch.bfloat16)


SLOWLY = """
import sys, time, torch
from pathlib import Path
from llava_fast.data import feature_cache
from tests.data.test_feature_cache import SCENES, model_and_processor

torch.set_num_threads(1)
feature_cache.AT_ONCE = 4
honest = feature_cache._read

def read(*arguments):
    time.sleep(0.2)
    return honest(*arguments)

feature_cache._read = read
model, processor = model_and_processor()
feature_cache.cached_processor(processor, model, SCENES, Path(sys.argv[1]), torch.float32)
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A run that makes the cache and takes its time."""
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", SLOWLY, str(folder)], cwd=root, stderr=subprocess.DEVNULL)


def test_killed_and_two_at_once(tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".*.part")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("*.digests"))
    both = [start(tmp_path) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    assert listing(tmp_path) == [".digests", ".features", ".lock"]
    model, processor = model_and_processor()
    batch = cached_processor(processor, model, SCENES, tmp_path, torch.float32).pack(list(SCENES))
    with torch.no_grad():
        expected = model.image_features(processor.pack(list(SCENES)).pixel_values)
    torch.testing.assert_close(batch.pixel_values, expected, atol=1e-5, rtol=1e-5)


def test_files_that_are_missing_broken_or_changed(tmp_path: Path) -> None:
    from llava_fast.data.samples import load_samples

    write(tmp_path / "data", 6, 3)
    (tmp_path / "data" / "broken.png").write_bytes(b"no picture")
    samples = list(load_samples([tmp_path / "data" / "scenes.json"], tmp_path / "data"))
    missing = {**samples[0], "id": "m", "image": str(tmp_path / "gone.png")}
    broken = {**samples[0], "id": "b", "image": str(tmp_path / "data" / "broken.png")}
    model, processor = model_and_processor()
    cached = cached_processor(processor, model, [*samples, missing, broken], tmp_path / "c", torch.float32)
    assert cached.pack(samples[:2]).pixel_values.shape == (2, 9, 128)
    for sample in (missing, broken):
        with pytest.raises(ImageError, match=Path(sample["image"]).name):
            cached.pack([sample])
    Path(samples[1]["image"]).write_bytes(Path(samples[1]["image"]).read_bytes() + b"x")
    with pytest.raises(ImageError, match="has changed since the feature cache was made"):
        cached.pack([samples[1]])


def test_workers_open_the_file_for_themselves(tmp_path: Path) -> None:
    model, processor = model_and_processor()
    cached = cached_processor(processor, model, SCENES, tmp_path, torch.float32)
    first = cached.pack([SCENES[0]])
    assert len(pickle.dumps(cached.image)) < 10_000  # the map does not travel
    assert torch.equal(pickle.loads(pickle.dumps(cached.image))(SCENES[0]["image"]), first.pixel_values[0])


def test_text_alone_needs_no_cache(tmp_path: Path) -> None:
    text = {"id": "t", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]}
    model, processor = model_and_processor()
    assert cached_processor(processor, model, [text], tmp_path, torch.float32) is processor
    mixed = cached_processor(processor, model, [text, SCENES[0]], tmp_path, torch.float32)
    with torch.no_grad():
        assert model.loss(mixed.pack([text])) == model.loss(processor.pack([text]))
