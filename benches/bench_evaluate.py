"""ScienceQA problems with pictures: answered by `evaluate scienceqa`, and by the engine alone given the same requests.

What lies between the two is what the evaluation costs: reading problems, writing prompts and answers to files that a
killed run goes on from, parsing and scoring. Both sides open an engine and close it; neither loads the model. The
weights are random: the pipeline is measured, not the score. Needs ScienceQA's files (tests/realdata.py says where).
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from statistics import median

import pytest
import torch

import llava_fast as lf
from llava_fast.data.scienceqa import image_path
from llava_fast.evaluate.__main__ import main
from llava_fast.evaluate.answering import TokenSetup
from llava_fast.evaluate.scienceqa_prompts import rows_of
from llava_fast.processor import Tokenizer
from tests.realdata import real_data

GROUP = "ScienceQA with pictures, tiny"
TOKENS = 32  # of an answer, at most


@pytest.fixture(scope="module")
def problems():
    """By number, those of the test split whose pictures are at hand."""
    folder = real_data("scienceqa", "images")
    every = json.loads(real_data("scienceqa", "problems.json").read_text())
    splits = json.loads(real_data("scienceqa", "pid_splits.json").read_text())
    named = {pid: image_path(pid, every[pid]) for pid in splits["test"] if pid in every}
    return {pid: every[pid] for pid, name in named.items() if name and (folder / name).is_file()}


@pytest.fixture(scope="module")
def command(problems, tmp_path_factory):
    """The arguments of the evaluation but for --out; a model of the tiny preset is written for them."""
    folder = tmp_path_factory.mktemp("scienceqa")
    tokenizer = Tokenizer.load(real_data("tokenizer", "llama2_tokenizer.model"))
    config = lf.ModelConfig.preset("tiny")
    config = config.replace(text=replace(config.text, vocab_size=tokenizer.vocab_size), template="v0")
    lf.save(lf.Llava(config, seed=0), lf.Processor.from_config(config, tokenizer), folder / "model")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "splits.json").write_text(json.dumps({"test": list(problems)}))
    options = {"problems": folder / "problems.json", "splits": folder / "splits.json", "model": folder / "model"}
    options |= {"images": real_data("scienceqa", "images"), "max-tokens": TOKENS, "max-sequences": 64}
    return ["scienceqa", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


@pytest.mark.parametrize("impl", ["engine", "evaluate"])
def test_scienceqa(benchmark, problems, command, impl, monkeypatch, tmp_path):
    if benchmark.disabled and impl == "evaluate":
        pytest.skip("with nothing to time, the check beside the engine is the same")
    benchmark.group = GROUP
    model, processor = lf.load(command[command.index("--model") + 1])
    monkeypatch.setattr(TokenSetup, "open", lambda setup, device: lf.Engine(model, processor, setup.engine))
    setups = []
    monkeypatch.setattr("llava_fast.evaluate.scienceqa.setup_from", lambda args: keep(setups, args))
    outs = iter(range(1000))
    cpu: list[float] = []

    def evaluate() -> dict[str, str]:
        out = tmp_path / str(next(outs))
        assert main([*command, "--out", str(out)]) == 0
        lines = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
        return {line["question_id"]: line["text"] for line in lines}

    expected = evaluate()  # also says how the command asks
    rows = rows_of(problems, "reason-first", image_last=False)
    requests = [setups[0].request(row, number) for number, row in enumerate(rows)]

    def engine_alone() -> dict[str, str]:
        with setups[0].open("cpu") as engine:
            made = engine.generate(requests)
        return {str(row["id"]): one.text.strip() for row, one in zip(rows, made, strict=True)}

    assert engine_alone() == expected
    work = {"engine": engine_alone, "evaluate": evaluate}[impl]

    def timed() -> None:
        started = time.process_time()
        work()
        cpu.append(time.process_time() - started)

    benchmark.pedantic(timed, rounds=5, warmup_rounds=0)
    if benchmark.stats is None:
        return
    benchmark.extra_info |= {
        "shape": f"tiny, {len(requests)} problems with a picture each, answers of at most {TOKENS} tokens",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "requests_per_s": len(requests) / benchmark.stats.stats.median,
        "cpu_s": median(cpu),  # of all threads: less at the mercy of what else the machine does
    }


def keep(setups, args):
    from llava_fast.evaluate.answering import setup_from

    setup, devices = setup_from(args)
    setups.append(setup)
    return setup, devices
