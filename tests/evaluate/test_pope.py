"""POPE: the authors' reading of yes and no, figures by hand, the command line."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llava_fast.evaluate.__main__ import main
from llava_fast.evaluate.pope import is_yes, score
from tests.evaluate.conftest import write_lines


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("yes", True),
        ("No", False),
        ("no.", False),
        ("No, there is none.", False),
        ("There is not a dog. Yes", False),
        ("A dog. No cat", True),
        ("Nobody", True),
        ("", True),
    ],
)
def test_an_answer_is_yes_unless_its_first_sentence_says_no(text, yes):
    assert is_yes(text) is yes


def test_figures_by_hand():
    found = score([(True, True)] * 3 + [(True, False)] + [(False, True)] * 2 + [(False, False)] * 4)
    assert found == pytest.approx({"accuracy": 70, "precision": 60, "recall": 75, "f1": 200 / 3, "yes": 50})


def questions(folder, name):
    rows = [(n, "a.png", f"Is there a {n}?", "yes" if n % 2 else "no") for n in range(4)]
    names = ("question_id", "image", "text", "label")
    return write_lines(folder / f"{name}.jsonl", [dict(zip(names, row, strict=True)) for row in rows])


def test_a_file_of_answers(tmp_path, capsys):
    rows = [{"question_id": n, "text": "Yes" if n != 2 else "No"} for n in range(4)]
    argv = ["pope", "--questions", str(questions(tmp_path, "random")), "--json", str(tmp_path / "out.json")]
    assert main([*argv, "--answers", str(write_lines(tmp_path / "answers.jsonl", rows))]) == 0
    whole = json.loads((tmp_path / "out.json").read_text())
    assert whole["scores"]["random"]["f1"] == pytest.approx(80.0) and whole["metrics"]["all"] == 75.0
    assert main([*argv, "--answers", str(write_lines(tmp_path / "answers.jsonl", rows[:2]))]) == 1
    assert "lacks 2 of 4 answers" in capsys.readouterr().err


def test_the_engine_answers(tmp_path, checkpoint):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    files = [str(questions(tmp_path, name)) for name in ("random", "popular")]
    machine = ["--devices", "cpu", "--kv-cache-bytes", str(1 << 22), "--max-sequences", "4", "--max-tokens", "2"]
    where = ["--images", str(tmp_path), "--out", str(tmp_path / "run"), "--json", str(tmp_path / "out.json")]
    assert main(["pope", "--questions", *files, "--model", str(checkpoint), *where, *machine]) == 0
    whole = json.loads((tmp_path / "out.json").read_text())
    assert set(whole["scores"]) == {"random", "popular"} and len(whole["items"]) == 8
    argv = ["pope", "--questions", *files, "--answers", str(tmp_path / "run" / "answers.jsonl")]
    assert main([*argv, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["scores"] == whole["scores"]
