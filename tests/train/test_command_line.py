"""What a user of the command line sees when something is missing or wrong: one line, the cause and the cure."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from llava_fast.train import demo
from llava_fast.train.__main__ import build_parser, choose_recipe, main
from llava_fast.train.demo import PARTS
from llava_fast.train.recipe import RECIPES, Recipe, recipe


def test_help_names_every_choice_of_a_recipe():
    done = subprocess.run([sys.executable, "-m", "llava_fast", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


def test_recipes_of_the_paper():
    """Appendix C: 2e-3 and 128 for one epoch; 2e-5 and 32 for three; ScienceQA twelve epochs; warm-up 3%, no decay."""
    first, second, science = (recipe(n) for n in ("paper-stage1", "paper-stage2", "scienceqa"))
    assert (first.lr, first.batch_size, first.epochs, first.stage) == (2e-3, 128, 1, 1)
    assert (second.lr, second.batch_size, second.epochs, second.stage) == (2e-5, 32, 3, 2)
    assert science.epochs == 12
    for one in (first, second, science):
        assert (one.warmup_ratio, one.weight_decay, one.max_length) == (0.03, 0.0, 2048)
        assert (one.image_position, one.mask) == ("random", "answers")
    newer = recipe("llava-1.5-stage1"), recipe("llava-1.5-stage2")
    assert [(r.lr, r.batch_size, r.epochs) for r in newer] == [(1e-3, 256, 1), (2e-5, 128, 1)]


def test_options_change_the_recipe():
    args = build_parser().parse_args(["--recipe", "paper-stage2", "--lr", "1e-4", "--activation-checkpointing", "full"])
    chosen = choose_recipe(args)
    assert chosen == recipe("paper-stage2", lr=1e-4, activation_checkpointing="full")
    assert choose_recipe(build_parser().parse_args(["--stage", "2"])) == recipe("paper-stage2")
    assert set(RECIPES) >= {"paper-stage1", "paper-stage2"}


START = ["--preset", "tiny", "--tokenizer", str(PARTS / "decoder")]
WRONG = {
    "no-data": (["--preset", "tiny"], "--preset needs --data"),
    "no-start": (["--data", "DATA"], "give one start: --model DIR"),
    "two-starts": (["--data", "DATA", "--model", "x", *START], "give one start"),
    "no-file": (["--data", "nothing.json", *START], "nothing.json"),
    "not-json": (["--data", "TEXT", *START], "'text.txt line 1': expected a JSON object"),
    "no-model": (["--data", "DATA", "--model", "no/such"], "no/such"),
    "no-tokenizer": (["--data", "DATA", "--preset", "tiny", "--tokenizer", "none"], "none"),
    "stage-and-recipe": (["--data", "DATA", *START, "--recipe", "paper-stage1", "--stage", "2"], "is of stage 1"),
    "bad-lr": (["--data", "DATA", *START, "--lr", "-1"], "lr=-1.0 must be above 0"),
    "bad-stage": (["--data", "DATA", *START, "--stage", "3"], "choose 1 (projector)"),
    "missing-image": (["--data", "DATA", "--images", "elsewhere", *START, "--workers", "0"], "elsewhere"),
    "wrong-projector": (["--data", "DATA", *START, "--projector", "TEXT"], "TEXT"),
    "fresh-nothing": (["--data", "DATA", *START, "--fresh", "--out", "."], "holds no run"),
}


@pytest.mark.parametrize("arguments, says", WRONG.values(), ids=WRONG)
def test_mistakes(arguments, says, scenes_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("not a data file")
    names = {"DATA": str(scenes_folder / "scenes.json"), "TEXT": str(tmp_path / "text.txt")}
    assert main([names.get(a, a) for a in ["--out", "run", *arguments]]) == 1
    error = capsys.readouterr().err
    assert names.get(says, says) in error
    assert "Traceback" not in error


def test_fresh_deletes_the_run_and_nothing_else(scenes_folder, tmp_path):
    arguments = ["--data", str(scenes_folder / "scenes.json"), *START, "--out", str(tmp_path / "run"), "--workers", "0"]
    arguments += ["--stage", "1", "--batch-size", "32"]
    assert main(arguments) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main([*arguments, "--lr", "1e-4"]) == 1
    assert main([*arguments, "--lr", "1e-4", "--fresh"]) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_demonstration_end_to_end(tmp_path, monkeypatch, capsys):
    """Few samples: it runs, and measures a model that has not learned enough; the full run is the main job itself."""
    for name, value in {"CAPTIONS": 64, "INSTRUCTIONS": 96, "QUIZZES": 30}.items():
        monkeypatch.setattr(demo, name, value)
    assert main(["--out", str(tmp_path), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "answers.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "summary.json").read_text())
    for words, name in (("with the right picture", "accuracy"), ("with swapped pictures", "accuracy_swapped")):
        assert re.search(rf"{words} +{summary[name]:.1%}", said)
    assert summary["accuracy"] * 30 == pytest.approx(round(summary["accuracy"] * 30))  # a count of the 30 questions
    assert summary["stage2"]["final_loss"] < summary["stage2"]["first_loss"]


def test_guessing_is_what_constant_answers_reach():
    quizzes = demo.held_out(1200, 77)
    by_kind = {kind: demo.guessing([q for q in quizzes if q.kind == kind]) for kind in demo.QUESTIONS}
    assert by_kind["color"] == pytest.approx(1 / 8, abs=0.06)
    assert by_kind["form"] == pytest.approx(1 / 6, abs=0.06)
    assert by_kind["place"] == pytest.approx(1 / 9, abs=0.06)
    assert by_kind["count"] == pytest.approx(1 / 4, abs=0.06)
    assert by_kind["size"] == pytest.approx(1 / 2, abs=0.08)
    assert by_kind["whether"] == pytest.approx(1 / 2, abs=0.08)
