"""Pictures from COCO's files and from JSONL, and the contexts that a teacher is told."""

from __future__ import annotations

import json

import pytest

from llava_fast.datagen.__main__ import main
from llava_fast.datagen.coco import read_coco
from llava_fast.datagen.kinds import KINDS
from llava_fast.datagen.pictures import read_pictures
from llava_fast.errors import ConfigError
from tests.realdata import real_data


@pytest.fixture
def coco(tmp_path):
    """Two pictures as in COCO's annotation files; one annotation is of a crowd."""
    images = [
        {"id": 9, "file_name": "000000000009.jpg", "width": 640, "height": 480},
        {"id": 25, "file_name": "000000000025.jpg", "width": 400, "height": 500},
    ]
    captions = [(9, "A cat \n on a mat. "), (25, "Two dogs."), (9, "One cat.")]
    boxes = [(9, 17, [64, 120, 320.5, 360], 0), (25, 18, [0, 0, 200, 125], 0), (25, 18, [200, 250, 200, 250], 1)]
    files = {
        "captions.json": {"annotations": [{"image_id": i, "caption": c} for i, c in captions]},
        "instances.json": {
            "annotations": [{"image_id": i, "category_id": c, "bbox": b, "iscrowd": w} for i, c, b, w in boxes],
            "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps({"images": images, **content}))
    return tmp_path / "captions.json", tmp_path / "instances.json"


def test_contexts_of_coco(coco):
    cat, dogs = read_coco(*coco)
    assert (cat.id, cat.image) == ("000000000009", "000000000009.jpg")
    assert KINDS["conversation"].context(cat) == "A cat on a mat.\nOne cat."
    assert KINDS["detail"].context(cat) == "A cat on a mat.\nOne cat.\n\ncat: [0.1, 0.25, 0.601, 1.0]"
    assert KINDS["reasoning"].context(dogs) == "Two dogs.\n\ndog: [0.0, 0.0, 0.5, 0.25]"
    assert len(read_coco(*coco, crowds=True)[1].objects) == 2
    assert KINDS["detail"].context(read_coco(coco[0])[1]) == "Two dogs."


def test_converter(coco, tmp_path, capsys):
    out = tmp_path / "pictures.jsonl"
    assert main(["pictures", "--coco-captions", str(coco[0]), "--coco-instances", str(coco[1]), "--out", str(out)]) == 0
    assert list(read_pictures(out)) == read_coco(*coco)
    assert "2 pictures" in capsys.readouterr().out


def test_the_papers_form(coco):
    """The real file's contexts, written here by other means."""
    path = real_data("llava_bench_coco", "caps_boxes_coco2014_val_80.jsonl")
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    pictures = list(read_pictures(path))
    assert len(pictures) == 80
    for row, picture in zip(raw, pictures, strict=True):
        lines = [" ".join(c.split()) for c in row["captions"]] + [""] * bool(row["instances"])
        lines += ["{}: [{}, {}, {}, {}]".format(one["category"], *one["bbox"]) for one in row["instances"]]
        assert KINDS["detail"].context(picture).split("\n") == lines


@pytest.mark.parametrize("form", ["xyxy", "xywh"])
def test_pixels(form, tmp_path):
    box = [10, 20, 60, 120] if form == "xyxy" else [10, 20, 50, 100]
    row = {"image": "a.jpg", "caption": "x", "width": 100, "height": 200, "boxes": [{"category": "c", "bbox": box}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]))
    (picture,) = read_pictures(path, form)
    assert picture.objects[0].box == (0.1, 0.1, 0.6, 0.6) and picture.id == "a.jpg"
    with pytest.raises(ConfigError, match="not in shares of the picture; say --boxes"):
        list(read_pictures(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a", "captions": ["x"]}\n{"image": "b"}', "row 2: no 'caption'"),
        ('{"image": "a", "captions": [" "]}', "without a caption"),
        ('{"image": "a", "captions": "x"}', "no list of texts"),
        ('[{"image": "a"', "neither a JSON array nor JSON lines"),
        ('{"image": "a", "caption": "x", "boxes": [{"category": "c", "bbox": [1, 2]}]}', "a box of 2 numbers"),
    ],
)
def test_rows_that_are_no_pictures(text, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        list(read_pictures(path))


def test_files_that_are_not_cocos(coco, tmp_path):
    with pytest.raises(ConfigError, match=r"no captions file of COCO; give captions_train2017\.json"):
        read_coco(coco[1])
    with pytest.raises(ConfigError, match="No such file"):
        read_coco(tmp_path / "none.json")
