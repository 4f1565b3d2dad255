"""python -m llava_fast.generate from end to end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import pytest

import llava_fast as lf
from llava_fast.__main__ import main as llava_fast_main
from llava_fast.generate.__main__ import main
from llava_fast.generate.in_flight import InFlight


def test_answers_are_the_engines(batch, loaded):
    """Every form of line, bad ones among them; nothing stops the run, and the answers are the library's."""
    batch.write(
        {"id": "a", "image": "a.png", "prompt": "What is this?"},
        {"prompt": "And without?", "sampling": {"max_tokens": 6}},
        "not json",
        {"id": "a", "image": "none.png", "prompt": "What is this?"},
        "",
        {"question_id": 12, "image": "a.png", "text": "A question of LLaVA-Bench?", "category": "conv"},
        {"id": "c", "messages": [{"role": "user", "content": "x"}], "sampling": {"n": 2, "logprobs": 1}},
        {"prompt": "long " * 2000},
    )
    assert batch.run() == 1
    answers = batch.answers
    assert [a["line"] for a in answers] == [1, 2, 3, 4, 6, 7, 8]
    assert [a["id"] for a in answers] == ["a", 2, 3, "a", 12, "c", 8]
    errors = [a["error"] and a["error"]["type"] for a in answers]
    assert errors == [None, None, "InvalidRequestError", "ImageError", None, None, "PromptTooLongError"]
    assert "none.png" in answers[3]["error"]["message"] and answers[3]["text"] is None

    content = [{"type": "image", "image": batch.input.parent / "a.png"}, {"type": "text", "text": "What is this?"}]
    first = lf.Request(messages=[{"role": "user", "content": content}], sampling=lf.SamplingParams(max_tokens=4))
    with lf.Engine(*loaded, lf.EngineConfig(kv_cache_bytes=1 << 21, max_sequences=4), background=False) as engine:
        expected = engine.generate([first])[0]
    assert answers[0] == {
        "line": 1,
        "id": "a",
        "text": expected.text,
        "finish_reason": "length",
        "generated_tokens": 4,
        "prompt_tokens": expected.prompt_tokens,
        "error": None,
    }
    assert answers[1]["generated_tokens"] == 6
    assert [o["generated_tokens"] for o in answers[5]["outputs"]] == [4, 4] and answers[5]["generated_tokens"] == 8
    assert len(answers[5]["logprobs"]) == 4 and len(answers[5]["logprobs"][0]["top"]) == 1

    summary = json.loads(batch.summary.read_text())
    assert {name: summary[name] for name in ("lines", "answered", "errors", "left")} == {
        "lines": 7,
        "answered": 4,
        "errors": 3,
        "left": 0,
    }
    assert summary["this_run"]["generated_tokens"] == 4 + 6 + 4 + 8


def test_resumes(batch, capsys):
    """Drawn answers too are the same, whichever lines a run begins with."""
    batch.write(*({"prompt": f"Tell me about {n}."} for n in range(12)))
    options = ["--temperature", 1.0]
    assert batch.run(*options) == 0
    whole, lines = batch.answers, batch.output.read_bytes().splitlines(keepends=True)
    batch.output.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert batch.run(*options, "--max-sequences", 2) == 0
    assert batch.answers == whole
    assert json.loads(batch.summary.read_text())["this_run"]["requests"] == 7
    capsys.readouterr()
    assert batch.run(*options) == 0  # nothing left: no model is loaded
    assert "loading" not in capsys.readouterr().err
    assert batch.run() == 2
    assert "{'max_tokens': 4, 'temperature': 1.0} then, {'max_tokens': 4} now" in capsys.readouterr().err
    assert batch.answers == whole
    assert batch.run("--overwrite") == 0
    assert batch.answers != whole


def test_another_checkpoint_is_told(batch, capsys, tmp_path, checkpoint):
    batch.write({"prompt": "x"})
    assert batch.run() == 0
    batch.checkpoint = tmp_path / "other"
    batch.checkpoint.mkdir()
    for path in checkpoint.iterdir():
        (batch.checkpoint / path.name).write_bytes(path.read_bytes())
    assert batch.run() == 0  # the same, elsewhere
    weights = batch.checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert batch.run() == 2
    assert "model: " in capsys.readouterr().err


def test_errors_are_retried_when_asked(batch):
    batch.write({"image": "late.png", "prompt": "x"}, {"prompt": "y"})
    assert batch.run() == batch.run() == 1
    (batch.input.parent / "late.png").write_bytes((batch.input.parent / "a.png").read_bytes())
    assert batch.run() == 1
    assert batch.run("--retry-errors") == 0
    assert [answer["error"] for answer in batch.answers] == [None, None]


def test_images_elsewhere(batch, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "pictures" / "b.png")
    batch.write({"image": "b.png", "prompt": "x"})
    assert batch.run("--image-dir", tmp_path / "pictures") == 0


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--temperature", -1], "temperature=-1.0 must be"),
        (["--max-step-tokens", 2], "max_step_tokens=2"),
        (["--devices", "gpu7"], "'gpu7' is no device"),
        (["--devices", "cuda:99"], "there is no cuda:99"),
        (["--input", "nothing.jsonl"], "--input nothing.jsonl: No such file"),
        (["--json", "none/here.json"], "there is no folder"),
        (["--output", "/proc/out.jsonl"], "--output /proc/out.jsonl"),
        (["--output", "IN", "--overwrite"], "is the input"),
    ],
)
def test_what_cannot_begin_is_said_and_changes_nothing(batch, capsys, options, cause):
    batch.write({"prompt": "x"})
    before = batch.input.read_text()
    assert batch.run(*(batch.input if option == "IN" else option for option in options)) == 2
    assert cause in capsys.readouterr().err
    assert batch.input.read_text() == before
    assert not batch.output.exists()


def test_no_model(batch, capsys):
    batch.write({"prompt": "x"})
    batch.checkpoint = "no/such"
    assert batch.run() == 2
    assert "no/such" in capsys.readouterr().err


def test_usage(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    monkeypatch.setattr(sys, "argv", ["llava-fast", "generate", "--help"])
    with pytest.raises(SystemExit) as stopped:
        llava_fast_main()
    told = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(option in told for option in ("--kv-cache-bytes", "--max-tokens", "--retry-errors", "--dtype"))


def test_interrupt_keeps_what_is_done(batch, capsys, monkeypatch):
    """Ctrl-C after the first answers: they stand, the command says how to go on, and the next run does the rest."""
    batch.write(*({"prompt": f"Tell me about {n}."} for n in range(40)))
    collect = InFlight.collect

    def and_interrupt(self, seconds):
        answers = collect(self, seconds)
        if answers:
            os.kill(os.getpid(), signal.SIGINT)
        return answers

    monkeypatch.setattr(InFlight, "collect", and_interrupt)
    assert batch.run() == 130
    assert "start the same command again to go on" in capsys.readouterr().out
    assert 0 < len(batch.answers) < 40
    assert not any(thread.name == "llava_fast.Engine" for thread in threading.enumerate())
    monkeypatch.undo()
    assert batch.run() == 0
    assert len(batch.answers) == 40


def test_a_failed_engine_is_no_answer(batch, capsys, monkeypatch):
    """What the engine held when it stopped is left, not failed."""
    batch.write(*({"prompt": f"Tell me about {n}."} for n in range(40)))

    def broken(*_):
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(lf.Engine, "_postprocess", broken)
    assert batch.run() == 1
    assert "the card is gone" in capsys.readouterr().err
    assert batch.answers == []
    assert json.loads(batch.summary.read_text())["left"] == 40


def test_a_full_disk_is_said(batch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    batch.write({"prompt": "x"})
    os.symlink("/dev/full", batch.output)
    assert batch.run() == 1
    assert "No space left" in capsys.readouterr().err


def test_only_so_many_lines_are_held(batch, monkeypatch):
    batch.write(*({"prompt": f"{n}"} for n in range(50)))
    held = []
    add = InFlight.add

    def counted(self, line):
        add(self, line)
        held.append(len(self))

    monkeypatch.setattr(InFlight, "add", counted)
    assert batch.run() == 0
    assert len(held) == 50 and max(held) == 8  # twice --max-sequences
