"""One process a card, two on a CPU here."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

import llava_fast as lf
from llava_fast.errors import EngineClosedError
from llava_fast.generate.cards import Cards
from llava_fast.generate.output import Output
from llava_fast.generate.setup import Setup


def test_two_processes_answer_and_one_dies(batch, capsys, monkeypatch):
    """Both answer; one is killed at work: the other goes on, the lines that are lost are named, the next run does them,
    and no answer depends on who gave it."""
    batch.write(*({"id": f"q{n}", "prompt": f"Tell me about {n}."} for n in range(1, 61)), "not json")
    write, killed = Output.write, []

    def and_kill(self, answers):
        write(self, answers)
        if self.answered >= 20 and not killed:
            killed.append(multiprocessing.active_children()[0])
            os.kill(killed[0].pid, signal.SIGKILL)

    monkeypatch.setattr(Output, "write", and_kill)
    assert batch.run("--devices", "cpu,cpu", "--temperature", 1) == 1
    summary = json.loads(batch.summary.read_text())
    assert summary["this_run"]["devices"] == ["cpu", "cpu"]
    assert summary["errors"] == 1 and summary["answered"] + summary["left"] == 60
    assert not multiprocessing.active_children()

    lost = sorted({*range(1, 62)} - {answer["line"] for answer in batch.answers})
    assert 0 < len(lost) <= 8  # what one process holds: the other did the rest
    (fault,) = summary["this_run"]["faults"]
    assert f"the process of cpu died (by signal 9); unanswered are its {len(lost)} lines" in fault
    assert f" {', '.join(map(str, lost))}" in fault and fault in capsys.readouterr().err

    assert batch.run("--temperature", 1) == 1
    assert [answer["id"] for answer in batch.answers] == [*(f"q{n}" for n in range(1, 61)), 61]
    together = batch.answers
    assert batch.run("--temperature", 1, "--overwrite") == 1
    assert batch.answers == together


def test_what_keeps_a_process_from_starting_is_said(checkpoint):
    setup = Setup(model=str(checkpoint), engine=lf.EngineConfig(kv_cache_bytes=1))
    with pytest.raises(EngineClosedError, match=r"the process of cpu could not start: ConfigError: .*kv_cache_bytes"):
        Cards(setup, ["cpu"])
    assert not multiprocessing.active_children()
