"""scienceqa.py against texts written out by hand in the authors' layout, and on the real problems."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llava_fast.data import scienceqa
from llava_fast.data.samples import load_samples
from llava_fast.data.scienceqa import (
    INPUT_FORMATS,
    OUTPUT_FORMATS,
    build_answer,
    build_question,
    build_sample,
    convert,
    correct_letter,
    main,
)
from llava_fast.errors import ConfigError, SampleError
from tests.realdata import real_data

PROBLEM: dict[str, Any] = {
    "question": "Which is  a fish?",
    "choices": ["cod", "cat", "crow"],
    "answer": 2,
    "hint": "Look.\nTwice. ",
    "image": "image.png",
    "split": "val",
    "lecture": "Fish swim.\nMost do.",
    "solution": "A crow   flies.",
}
BARE = PROBLEM | {"hint": "", "image": None, "lecture": "", "solution": "", "answer": 0}

QUESTIONS = {
    "CQM": "Context: Look.\nTwice.\nQuestion: Which is a fish?\nOptions: (A) cod (B) cat (C) crow",
    "QCM": "Which is a fish?\nContext: Look.\nTwice.\nOptions: (A) cod (B) cat (C) crow",
    "QCML": "Which is a fish?\nContext: Look.\nTwice.\nOptions: (A) cod (B) cat (C) crow\n"
    "BECAUSE: Fish swim.\nMost do.",
    "QCME": "Which is a fish?\nContext: Look.\nTwice.\nOptions: (A) cod (B) cat (C) crow\nBECAUSE: A crow  flies.",
    "QCMLE": "Which is a fish?\nContext: Look.\nTwice.\nOptions: (A) cod (B) cat (C) crow\n"
    "BECAUSE: Fish swim.\nMost do. A crow  flies.",
    "QCLM": "Which is a fish?\nContext: Look.\nTwice.\nBECAUSE: Fish swim.\nMost do.\n"
    "Options: (A) cod (B) cat (C) crow",
    "QCEM": "Which is a fish?\nContext: Look.\nTwice.\nBECAUSE: A crow  flies.\nOptions: (A) cod (B) cat (C) crow",
    "QCLEM": "Which is a fish?\nContext: Look.\nTwice.\nBECAUSE: Fish swim.\nMost do. A crow  flies.\n"
    "Options: (A) cod (B) cat (C) crow",
}
ANSWERS = {
    "A": "The answer is C.",
    "AL": "The answer is C. BECAUSE: A crow  flies.",  # L and E swapped, as the authors have it
    "AE": "The answer is C. BECAUSE: Fish swim.\nMost do.",
    "ALE": "The answer is C. BECAUSE: Fish swim.\nMost do. A crow  flies.",
    "AEL": "The answer is C. BECAUSE: A crow  flies. Fish swim.\nMost do.",
    "LA": "Fish swim.\nMost do. The answer is C.",
    "EA": "A crow  flies. The answer is C.",
    "LEA": "Fish swim.\nMost do. A crow  flies. The answer is C.",
    "ELA": "A crow  flies. Fish swim.\nMost do. The answer is C.",
    "LEPA": "LECTURE: Fish swim.\nMost do.\nSOLUTION: A crow  flies.\n###\nANSWER: C.",
}


def test_the_tables_are_complete():
    assert set(QUESTIONS) == set(INPUT_FORMATS) and set(ANSWERS) == set(OUTPUT_FORMATS)


@pytest.mark.parametrize("name", INPUT_FORMATS)
def test_questions(name: str):
    assert build_question(PROBLEM, name) == QUESTIONS[name]


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
def test_answers(name: str):
    assert build_answer(PROBLEM, name) == ANSWERS[name]


def test_what_is_empty_leaves_no_label():
    asked = "Which is a fish?\nContext: N/A\nOptions: (A) cod (B) cat (C) crow"
    for name in ("QCM", "QCML", "QCME", "QCMLE"):
        assert build_question(BARE, name) == asked
    # In the middle the authors' converter leaves the label standing.
    assert build_question(BARE, "QCLM") == asked.replace("\nOptions", "\nBECAUSE: \nOptions")
    for name in ("A", "AL", "AE", "ALE", "AEL", "LA", "EA"):
        assert build_answer(BARE, name) == "The answer is A."
    for name in ("LEA", "ELA"):  # of three spaces one pass leaves two, and one goes with the label
        assert build_answer(BARE, name) == " The answer is A."
    assert build_answer(BARE, "LEPA") == "###\nANSWER: A."
    assert build_answer(BARE | {"solution": "So."}, "LEPA") == "SOLUTION: So.\n###\nANSWER: A."


def test_choices_that_stand_in_the_question():
    listed = BARE | {"question": "Which?\nA. cod\nB. cat", "choices": [], "answer": 1}
    asked, told = (t["value"] for t in build_sample("12", listed, "QCM-A")["conversations"])
    assert asked == "Which?\nA. cod\nB. cat\nContext: N/A\nOptions:" and told == "The answer is B."


def test_sample_with_and_without_image():
    sample = build_sample("12", PROBLEM, "QCM-LEPA")
    assert sample == {
        "id": "12",
        "image": "val/12/image.png",
        "conversations": [
            {"from": "human", "value": QUESTIONS["QCM"] + "\n<image>"},
            {"from": "gpt", "value": ANSWERS["LEPA"]},
        ],
    }
    assert correct_letter(PROBLEM) == "C"
    text_only = build_sample("12", BARE, "CQM-A")
    assert "image" not in text_only and "<image>" not in text_only["conversations"][0]["value"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": [], "answer": 5}, "answer 5 is none of 5 choices"),
        ({"answer": 3}, "answer 3 is none of 3 choices"),
        ({"answer": -1}, "answer -1"),
        ({"choices": list("abcdef")}, "6 choices, or they are more than 5"),
        ({"hint": None}, "not a ScienceQA problem"),
        ({"answer": "C"}, "not a ScienceQA problem"),
    ],
)
def test_malformed_problems(changes: dict[str, Any], message: str):
    with pytest.raises(SampleError, match=f"sample '12': .*{message}"):
        build_sample("12", PROBLEM | changes, "QCM-A")
    del (short := dict(PROBLEM))["choices"]
    with pytest.raises(SampleError, match="KeyError: 'choices'"):
        build_sample("12", short, "QCM-A")


@pytest.mark.parametrize("name", ["QCM", "QCM-X", "MCQ-A", "", "QCM-LEPA-A", "-A"])
def test_unknown_formats(name: str):
    with pytest.raises(ConfigError, match=r"format .* is not known; choose one of"):
        build_sample("12", PROBLEM, name)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Four problems: text only, picture there, picture missing, and one that problems.json lacks."""
    problems = {"1": BARE, "2": PROBLEM, "3": PROBLEM}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "splits.json").write_text(json.dumps({"val": ["3", "1", "2"], "train": ["1", "9"], "none": []}))
    picture = tmp_path / "images" / "val" / "2" / "image.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    return {"problems": tmp_path / "problems.json", "splits": tmp_path / "splits.json", "images": tmp_path / "images"}


def test_convert_counts_what_is_missing(files: dict[str, Path]):
    kept, counts = convert(**files, split="val")
    assert [s["id"] for s in kept] == ["3", "1", "2"]
    assert (counts.samples, counts.with_image, counts.image_missing, counts.problem_missing) == (3, 2, 1, 0)
    kept, counts = convert(**files, split="val", skip_missing=True)
    assert [s["id"] for s in kept] == ["1", "2"]
    assert (counts.samples, counts.with_image, counts.image_missing, counts.problem_missing) == (2, 1, 1, 0)
    with pytest.raises(ConfigError, match="lacks 1 of the 2 problems of 'train'"):
        convert(**files, split="train")
    kept, counts = convert(**files, split="train", skip_missing=True)
    assert [s["id"] for s in kept] == ["1"] and counts.problem_missing == 1
    assert convert(**files, split="none")[0] == []
    with pytest.raises(ConfigError, match=r"split='tset' is not in .*choose one of val, train, none"):
        convert(**files, split="tset")


def command(files: dict[str, Path], out: Path, *more: str) -> list[str]:
    paths = [x for name, path in files.items() for x in (f"--{name}", str(path))]
    return [*paths, "--split", "val", "--out", str(out), *more]


def test_command_line(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "val.json"
    assert main(command(files, out, "--format", "QCM-LEA", "--skip-missing")) == 0
    printed = capsys.readouterr().out
    assert "2 samples, 1 with an image" in printed and "images not on disk: 1 (left out)" in printed
    assert os.listdir(out.parent) == ["val.json"]
    samples = list(load_samples(out, files["images"]))
    assert [s["id"] for s in samples] == ["1", "2"] and Path(samples[1]["image"]).is_file()
    assert samples[1]["conversations"][1]["value"] == ANSWERS["LEA"]


def test_command_line_errors(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "val.json"
    cases = {
        "split='x' is not in": ["--split", "x"],
        "output format 'Z' is not known": ["--format", "QCM-Z"],
        "cannot read the file: No such file": ["--problems", str(tmp_path / "nowhere.json")],
    }
    (tmp_path / "broken.json").write_text("{")
    cases["broken.json is not valid JSON"] = ["--problems", str(tmp_path / "broken.json")]
    (tmp_path / "list.json").write_text("[]")
    cases["must hold a JSON object"] = ["--splits", str(tmp_path / "list.json")]
    for message, arguments in cases.items():
        assert main(command(files, out, *arguments)) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "QCLEM" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out" / "val.json"
    out.parent.mkdir()
    out.write_text("old")

    def fail(value: Any, file: Any, **options: Any) -> None:
        file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(scienceqa.json, "dump", fail)
    assert main(command(files, out)) == 1
    assert "disk full" in capsys.readouterr().err
    assert out.read_text() == "old" and os.listdir(out.parent) == ["val.json"]


def test_real_test_split():
    problems, splits = real_data("scienceqa", "problems.json"), real_data("scienceqa", "pid_splits.json")
    images = real_data("scienceqa", "images")
    samples, counts = convert(problems, splits, "test", images, "QCM-LEPA")
    assert len(samples) == counts.samples == 4241 and counts.with_image == 2017  # ScienceQA's own figures
    on_disk = len(list(images.rglob("image.png")))
    assert counts.image_missing == 2017 - on_disk
    kept, _ = convert(problems, splits, "test", images, "QCM-LEPA", skip_missing=True)
    assert len(kept) == 4241 - counts.image_missing
    assert sum("image" not in s for s in kept) == 4241 - 2017  # text-only problems stay


def test_real_answers_of_the_authors_model_have_this_form():
    """LLaVA-13B learnt the LEPA layout, and where it was right its last line is the one built here."""
    table = json.loads(real_data("scienceqa", "problems.json").read_text(encoding="utf-8"))
    stored = json.loads(real_data("scienceqa", "predictions_llava_13b_v0.json").read_text(encoding="utf-8"))
    right = [p for p, choice in stored["results"].items() if choice == table[p]["answer"]]
    assert len(right) > 3800
    same = sum(f"The answer is {correct_letter(table[pid])}." in stored["outputs"][pid].strip() for pid in right)
    assert same / len(right) > 0.99
