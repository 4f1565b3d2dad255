"""python -m llava_fast.datagen against a server that misbehaves, is killed and goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from llava_fast.datagen.__main__ import main
from llava_fast.datagen.built_in import scene_pictures
from llava_fast.datagen.kinds import KINDS
from llava_fast.datagen.pictures import read_pictures
from llava_fast.datagen.plan import Plan, Task
from llava_fast.datagen.prompting import read_prompts
from llava_fast.datagen.rule_teacher import RuleTeacher
from llava_fast.train.__main__ import main as train
from tests.datagen.server import PASSING
from tests.realdata import real_data

REFUSAL = "I'm sorry, but I can't help with that."
MALFORMED = "Question:\nWhat is it?\nIt is a shape."
SCRIPTS = [[fault, "good"] for fault in PASSING] + [
    ["429", "500", "good"],
    [REFUSAL, "good"],
    [MALFORMED, "good"],
    ["good"],
]
HOPELESS = [[MALFORMED, REFUSAL], ["According to the captions, there is a shape."]]


def draw(messages, scripts):
    """One of the scripts for these messages, always the same."""
    return scripts[int(hashlib.md5(json.dumps(messages).encode()).hexdigest(), 16) % len(scripts)]


def misbehave(messages):
    return draw(messages, SCRIPTS * 2 + HOPELESS)


def answers_of(sample):
    return [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]


def check_output(run, scenes):
    """Every task whose script has a good answer stands in the output once, in order, as the rule says it."""
    prompts = read_prompts()
    expected = {}
    for picture in scene_pictures(scenes, 1):
        for kind in KINDS.values():
            messages = prompts.messages(kind, picture)
            if misbehave(messages)[-1] == "good":
                text = str(RuleTeacher().answer(messages))
                blocks = [block.removeprefix("Answer:\n").strip() for block in text.split("===\n")]
                expected[f"{picture.id}-{kind.name}"] = blocks[1::2] if len(blocks) > 1 else [text]
    samples = run.json("instruct.json")
    got = {sample["id"]: answers_of(sample) for sample in samples}
    duplicates = {f"{row['id']}-{row['kind']}" for row in run.lines("rejected.jsonl") if row["reason"] == "duplicate"}
    assert len(got) == len(samples)
    assert set(got) == set(expected) - duplicates and len(duplicates) < 3
    assert all(got[name] == expected[name] for name in got)
    assert list(got) == [name for name in expected if name in got]
    return expected


def kill_after(good, run, server, arguments):
    """Start the command, kill -9 it after so many good answers, and leave what a kill within a write would leave."""
    command = [sys.executable, "-m", "llava_fast.datagen", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and server.done("good") < good:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run.out / "instruct.json").exists()
    with (run.out / "replies.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')


def test_misbehaving_server(run, serve, capsys):
    server = serve(misbehave, hang=1.5)
    assert run(server, "--scenes", 16, "--at-once", 12, "--timeout", 1) == 0
    check_output(run, 16)
    assert all(server.done(fault) for fault in PASSING)
    summary, rejected = run.json("summary.json"), run.lines("rejected.jsonl")
    assert {row["reason"] for row in rejected} >= {"refusal", "unparsable"}
    assert sum(sum(one.values()) for one in summary["rejected"].values()) == len(rejected)
    assert summary["this_run"]["answers"] == len(run.lines("replies.jsonl"))
    assert summary["this_run"]["prompt_tokens"] == 100 * summary["this_run"]["answers"]
    before, files = len(server.log), {p.name: p.read_bytes() for p in run.out.glob("*.json")}
    assert run(server, "--scenes", 16, "--price", 10, 30) == 0
    assert len(server.log) == before  # nothing is paid for twice
    files.pop("summary.json")
    assert all((run.out / name).read_bytes() == raw for name, raw in files.items())
    assert "48 have been answered" in capsys.readouterr().err


def test_killed_and_restarted(run, serve):
    """kill -9 in the middle, twice; the third run ends it, with at most the answers under way paid for twice."""
    server = serve(lambda messages: [entry for entry in misbehave(messages) if entry != "timeout"], delay=0.05)
    arguments = run.options(server, "--scenes", 24, "--at-once", 4)
    for good in (18, 36):
        kill_after(good, run, server, arguments)
    assert main(arguments) == 0
    expected = check_output(run, 24)
    assert server.done("good") <= len(expected) + 2 * 4
    keys = [line["key"] for line in run.lines("replies.jsonl")]
    assert len(keys) == len(set(keys))


def test_teacher_that_is_gone(run, serve, capsys):
    """A wrong key ends the run at once; a server that fails for ever fails tasks, and both can go on later."""
    assert run(serve(lambda _: ["401"]), "--scenes", 5) == 1
    assert "check address, model name, key and quota" in capsys.readouterr().err
    assert run(serve(lambda _: ["500"]), "--scenes", 3, "--tries", 2) == 1
    output = capsys.readouterr()
    assert "no answer in 2 tries" in output.err and "9 tasks have no answer" in output.out
    assert run.json("summary.json")["unanswered"] == {"conversation": 3, "detail": 3, "reasoning": 3}
    assert run(serve(lambda _: ["500"]), "--scenes", 30, "--tries", 1) == 1
    assert "the last 25 requests have failed" in capsys.readouterr().err
    assert run(serve(lambda m: ["400" if "one question" in m[0]["content"] else "good"]), "--scenes", 3) == 1
    assert run.json("summary.json")["samples"] == {"conversation": 3, "detail": 3, "reasoning": 0}
    assert "will not take this request" in capsys.readouterr().err


def test_budget_ends_a_run(run, serve, capsys):
    server = serve()
    price = ["--price", 1000, 0, "--at-once", 1]  # ten cents an answer
    assert run(server, "--scenes", 10, "--budget", 0.5, *price) == 1
    assert server.done("good") == 5 and "--budget 0.5 is spent" in capsys.readouterr().err
    assert run(server, "--scenes", 10, *price) == 0
    assert server.done("good") == 30


def test_replays_real_generations(run, serve, tmp_path):
    """The 90 real GPT-4 generations come out unchanged, through every kind of fault and kill -9; the JSON trains."""
    folder = real_data("llava_bench_coco")
    names = {"conv": "conversation", "detail": "detail", "complex": "reasoning"}
    real = {}
    for line in (folder / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines():
        row = json.loads(line)
        real[row["id"], names[row["type"]]] = row
    ids = {picture for picture, _ in real}
    rows = (folder / "caps_boxes_coco2014_val_80.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, rows) if row["id"] in ids]
    assert len(rows) == 30 and len(real) == 90
    pictures = tmp_path / "pictures.jsonl"
    pictures.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts()
    by_context = {}
    for task in Plan([Task(p, k) for p in read_pictures(pictures) for k in KINDS.values()]):
        row = real[task.picture.id, task.kind.name]
        blocks = f"Question:\n{row['instruction']}\n===\nAnswer:\n{row['output']}"
        good = row["output"] if task.kind.questions == "none" else blocks
        by_context[json.dumps(prompts.messages(task.kind, task.picture))] = good
    server = serve(lambda m: draw(m, SCRIPTS), answer=lambda m: by_context[json.dumps(m)], hang=1.5, delay=0.05)
    arguments = run.options(server, "--pictures", pictures, "--at-once", 8, "--timeout", 1)
    for good in (25, 50):
        kill_after(good, run, server, arguments)
    assert main(arguments) == 0
    assert server.done("good") <= 90 + 2 * 8
    keys = [line["key"] for line in run.lines("replies.jsonl")]
    assert len(keys) == len(set(keys))
    got = {sample["id"]: sample for sample in run.json("instruct.json")}
    assert len(got) == 90
    for (picture, kind), row in real.items():
        sample = got[f"{picture}-{kind}"]
        assert answers_of(sample) == [row["output"].strip()]
        question = sample["conversations"][0]["value"].replace("<image>", "").strip()
        assert question == row["instruction"].strip() if kind != "detail" else question in prompts.questions
    for number, row in enumerate(rows):  # COCO's pictures are not at hand: any of their names will do to train on
        Image.new("RGB", (40, 30), (8 * number, 90, 60)).save(tmp_path / Path(row["image"]).name)
    tokenizer = real_data("tokenizer", "llama2_tokenizer.model")
    options = {"recipe": "paper-stage2", "preset": "tiny", "tokenizer": tokenizer, "data": run.out / "instruct.json"}
    options |= {
        "images": tmp_path,
        "out": tmp_path / "trained",
        "epochs": 1,
        "batch-size": 45,
        "lr": 1e-3,
        "workers": 0,
    }
    assert train([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["final_loss"] < summary["first_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenes", "3"], "no teacher given"),
        (["--pictures", "none.jsonl", "--rules"], "knows the built-in scenes alone"),
        (["--scenes", "3", "--teacher-model", "x"], "wants an API key"),
        (["--scenes", "3", "--rules", "--budget", "1"], "needs --price"),
        (["--scenes", "3", "--rules", "--count", "detail=9"], "there are 3 pictures"),
        (["--scenes", "3", "--rules", "--count", "detail"], "give KIND=N"),
        (["--pictures", "none.jsonl", "--teacher-model", "x"], "No such file"),
        (["--rules", "--teacher-model", "x", "--scenes", "2"], "two teachers"),
        ([], "no teacher given"),
    ],
)
def test_errors_before_work(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_dry_run_prints_what_is_sent(run, serve, capsys):
    sent = []
    server = serve(lambda messages: sent.append(messages) or ["good"])
    assert main(["--scenes", "1", "--dry-run", "--out", str(run.out)]) == 0 and not run.out.exists()
    printed = capsys.readouterr().out
    assert run(server, "--scenes", 1) == 0
    assert len(sent) == 3
    for messages in sent:
        assert "".join(f"---- {m['role']}\n{m['content']}\n" for m in messages) in printed
    assert "3 requests, about" in printed


def test_interrupted(run, serve):
    """Ctrl-C: nothing more is asked, what is on its way arrives and is written, and the run goes on later."""
    server = serve(delay=0.2)
    command = [sys.executable, "-m", "llava_fast.datagen", *run.options(server, "--scenes", 20, "--at-once", 2)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.poll() is None and server.done("good") < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and "start the same command again to go on" in output
    samples = len(run.json("instruct.json"))
    assert 4 <= samples == server.done("good") < 60
    assert run(server, "--scenes", 20, "--at-once", 8) == 0
    assert server.done("good") == 60 and server.done("gone") == 0
