"""The round trip on a few scenes: every step runs, the report says what the steps left, and nothing is done twice."""

from __future__ import annotations

import json

import pytest

from llava_fast import round_trip
from llava_fast.round_trip import TUNED, UNTUNED, main


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trip")
    assert main(["--out", str(folder), "--scenes", "24", "--questions", "6", "--workers", "0"]) == 0
    return folder


def test_report_says_what_the_steps_left(out):
    report = json.loads((out / "report.json").read_text())
    for place, name in (("bench-stage1", UNTUNED), ("bench-stage2", TUNED)):
        metrics = json.loads((out / place / "result.json").read_text())["metrics"]
        values = {group: one[name]["value"] for group, one in report["scores"].items()}
        assert values == pytest.approx(metrics, abs=0.05)  # LLaVA-Bench rounds its means first
        assert list(report["scores"]) == ["conv", "detail", "complex", "all"]
    assert report["samples"] == {"conversation": 8, "detail": 8, "reasoning": 8}
    text = (out / "report.md").read_text()
    whole = report["scores"]["all"]
    assert f"{whole[TUNED]['value']:.1f} [" in text and f"{whole['difference']['value']:+.1f}" in text
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_both_models_stand_side_by_side(out):
    page = (out / "bench-stage2" / "page.html").read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    for number, place in ((1, "bench-stage1"), (2, "bench-stage2")):
        texts = [json.loads(line)["text"] for line in (out / place / "answers.jsonl").read_text().splitlines()]
        assert [item["answers"][number]["text"] for item in data["items"]] == texts
    assert [answer["who"] for answer in data["items"][0]["answers"]] == ["reference", UNTUNED, TUNED]
    assert all(answer["score"] is not None for item in data["items"] for answer in item["answers"])
    assert [row[0] for row in data["scores"][1:3]] == [f"relative score, {UNTUNED}", f"relative score, {TUNED}"]


def test_nothing_is_done_twice(out, monkeypatch, capsys):
    def never(argv):
        raise AssertionError(argv)

    before = (out / "report.json").read_bytes()
    monkeypatch.setattr(round_trip, "COMMANDS", dict.fromkeys(round_trip.COMMANDS, never))
    assert main(["--out", str(out), "--scenes", "24", "--questions", "6", "--workers", "0"]) == 0
    assert (out / "report.json").read_bytes() == before and capsys.readouterr().out.count("done before") == 7


def test_a_step_that_fails_ends_the_trip(tmp_path, monkeypatch):
    done = []
    commands = {name: lambda argv, name=name: done.append(name) or (130 if name == "train" else 0) for name in
                round_trip.COMMANDS}  # fmt: skip
    monkeypatch.setattr(round_trip, "COMMANDS", commands)
    assert main(["--out", str(tmp_path)]) == 130
    assert done == ["datagen", "datagen", "train"]
    assert main(["--out", str(tmp_path)]) == 130
    assert done == ["datagen", "datagen", "train", "train"]  # what was done before is not done again


def test_errors_before_work(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--scenes", "0"]) == 2
    (tmp_path / "steps.json").write_text("{half")
    assert main(["--out", str(tmp_path)]) == 1
    assert "steps.json is not JSON" in capsys.readouterr().err
