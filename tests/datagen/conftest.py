"""Fake teachers, and the command line on them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openai")

from llava_fast.datagen.__main__ import main
from llava_fast.datagen.rule_teacher import RuleTeacher
from tests.datagen.server import Server


@pytest.fixture
def serve():
    """Starts servers; by default they answer by rule about the built-in scenes, and well."""
    servers = []

    def start(script=lambda messages: ["good"], answer=lambda messages: str(RuleTeacher().answer(messages)), **more):
        servers.append(Server(answer, script, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Run:
    """A folder of results and the command that fills it."""

    def __init__(self, folder):
        self.out = folder

    def options(self, server, *more) -> list[str]:
        teacher = ["--teacher-url", server.url, "--teacher-model", "fake", "--pause", 0.01, "--timeout", 30]
        return [str(one) for one in (*teacher, "--out", self.out, *more)]

    def __call__(self, server, *more) -> int:
        return main(self.options(server, *more))

    def json(self, name):
        return json.loads((self.out / name).read_text())

    def lines(self, name):
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "out")
