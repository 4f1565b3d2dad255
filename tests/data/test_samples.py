"""samples.py against json.load, on real and on broken files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from llava_fast.data.samples import load_samples
from llava_fast.errors import ConfigError, SampleError
from tests.realdata import real_data

TURNS = [
    {"from": "human", "value": "<image>\nWas ist das? \u2014 \u4f60\u597d"},
    {"from": "gpt", "value": 'Ein "Bär" ] , \\'},
]


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "image": "x/y.jpg", "conversations": TURNS} | changes


def write(path: Path, rows: list[Any], **options: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, **options) + "\n" for r in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, **options), encoding="utf-8")
    return path


def test_real_file_equals_json_load():
    path, images = real_data("llava_pretrain", "chat.json"), real_data("llava_pretrain", "images")
    expected = json.loads(path.read_text(encoding="utf-8"))
    samples = load_samples(path, images)
    assert len(samples) == len(expected) > 300
    for ours, theirs in zip(samples, expected, strict=True):
        assert ours["conversations"] == theirs["conversations"] and ours["id"] == theirs["id"]
        assert ours["image"] == str(images / theirs["image"]) and Path(ours["image"]).is_file()


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}])
def test_both_forms(name: str, options: dict[str, Any], tmp_path: Path):
    rows = [row(id=f"ü{i}", image=f"ß/{i}.jpg") for i in range(20)]
    samples = load_samples(write(tmp_path / name, rows, **options))
    assert len(samples) == 20
    for i, sample in enumerate(samples):
        assert sample == row(id=f"ü{i}", image=str(tmp_path / f"ß/{i}.jpg"))
    assert samples[-1] == samples[19]
    for index in (20, -21):
        with pytest.raises(IndexError, match="among 20"):
            samples[index]


def test_indented_json_windows_line_ends_and_byte_order_mark(tmp_path: Path):
    rows = [row(id=str(i)) for i in range(3)]
    for name, text in {
        "indented.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "lines.jsonl": "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows),  # no newline at the end
    }.items():
        for start, end in (("", "\n"), ("\ufeff", "\r\n"), (" \n ", "\n")):
            path = tmp_path / name
            path.write_bytes((start + text).replace("\n", end).encode())
            assert [s["id"] for s in load_samples(path)] == ["0", "1", "2"]
            assert load_samples(path)[2]["conversations"] == TURNS


def test_ids_and_images(tmp_path: Path):
    rows = [row(id=7), row(image=["a.jpg", "b.jpg"]), row(image="/abs/c.jpg"), row(image=None), row(), row(image="")]
    del rows[4]["image"], rows[4]["id"]
    samples = load_samples(write(tmp_path / "rows.json", rows[:5]), tmp_path / "pictures")
    assert samples[0]["id"] == "7"
    assert samples[1]["image"] == [str(tmp_path / "pictures" / x) for x in ("a.jpg", "b.jpg")]
    assert samples[2]["image"] == "/abs/c.jpg"
    assert "image" not in samples[3] and "image" not in samples[4]
    assert samples[4]["id"] == "4"  # its place where the file gives none


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "rows.json", [row()])
    monkeypatch.chdir(tmp_path)
    samples = load_samples("rows.json", "pictures")
    monkeypatch.chdir("/")
    assert samples[0]["image"] == str(tmp_path / "pictures" / "x/y.jpg")


def test_several_files(tmp_path: Path):
    first = write(tmp_path / "a.json", [row(id="a0"), row(id="a1")])
    empty = write(tmp_path / "b.json", [])
    last = write(tmp_path / "c.jsonl", [{"conversations": TURNS}, row(id="c1")])
    samples = load_samples([first, empty, str(last)])
    assert [s["id"] for s in samples] == ["a0", "a1", "2", "c1"]
    assert len(load_samples(empty)) == 0 and len(load_samples([])) == 0


def test_pickle_is_small_and_equal(tmp_path: Path):
    rows = [row(id=str(i), conversations=[{"from": "human", "value": "x" * 500}, TURNS[1]]) for i in range(2000)]
    for name in ("rows.json", "rows.jsonl"):
        samples = load_samples(write(tmp_path / name, rows))
        data = pickle.dumps(samples)
        assert len(data) < 2000 * 16 + 2000
        again = pickle.loads(data)
        assert len(again) == 2000 and again[1234] == samples[1234]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": []}, "'conversations' must be a list of turns that is not empty"),
        ({"conversations": "hello"}, "'conversations' must be a list.*'hello'"),
        ({"conversations": None}, "found None"),
        ({"conversations": [TURNS[0], "hi"]}, "turn 1 must be.*'hi'"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "turn 0 must be.*'user'"),
        ({"conversations": [{"from": "human"}]}, "turn 0 must be"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 0 must be"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0 must be"),
        ({"image": 3}, "'image' must be a path or a list of paths, found 3"),
        ({"image": ["a.jpg", None]}, "'image' must be a path or a list of paths"),
        ({"image": {"path": "x"}}, "'image' must be a path or a list of paths"),
    ],
)
def test_malformed_samples_name_id_and_line(name: str, changes: dict[str, Any], message: str, tmp_path: Path):
    path = tmp_path / name
    rows = [json.dumps(r) for r in (row(), row(id="bad", **changes), row(id="good"))]
    path.write_text("\n".join(rows) if name.endswith("l") else "[\n" + ",\n".join(rows) + "]")
    samples = load_samples(path)
    with pytest.raises(SampleError, match=message) as caught:
        samples[1]
    assert caught.value.sample_id == "bad"
    assert f"{name} line {2 if name.endswith('l') else 3}" in str(caught.value)
    assert samples[2]["id"] == "good"


def test_array_of_something_else(tmp_path: Path):
    samples = load_samples(write(tmp_path / "rows.json", [row(), ["not", "a", "dict"]]))
    with pytest.raises(SampleError, match=r"rows\.json line 1.*expected an object.*\['not'"):
        samples[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ('[{"id": "a"},\n{"id": "b"', r"line 2.*not valid JSON"),
        ('[{"id": "a"}\n{"id": "b"}]', r"line 2.*Expecting ',' or '\]'"),
        ('[{"id": "a"},\n]', "line 2.*not valid JSON"),
        ("[", "not valid JSON"),
        ("[]\n[]", "line 2.*Extra data"),
        ('{"id": "a"}\nnonsense', "line 2.*expected a JSON object.*nonsense"),
        ("hello", r"line 1.*expected a JSON object"),
    ],
)
def test_broken_files_name_the_line(text: str, message: str, tmp_path: Path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(SampleError, match=rf"rows\.json.*{message}|{message}"):
        load_samples(tmp_path / "rows.json")


def test_broken_line_is_reported_when_read(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b'\n{"id": "cut", "conv\n{"id": "\xff"}\n')
    samples = load_samples(path)
    for index, line in ((1, 2), (2, 3)):
        with pytest.raises(SampleError, match=rf"rows\.jsonl line {line}': not a JSON row"):
            samples[index]
    assert samples[0]["id"] == "a"


def test_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot read the data file: No such file"):
        load_samples(tmp_path / "nowhere.json")
