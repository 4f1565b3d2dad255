"""The commands of the paper's ablations are ones that the command lines take; shares of data are what they say."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

import llava_fast as lf
from llava_fast.checkpoint import join, save_projector
from llava_fast.data.scienceqa import _parser as scienceqa_parser
from llava_fast.evaluate.__main__ import build_parser, main
from llava_fast.evaluate.recipes import RECIPES
from llava_fast.train.__main__ import build_parser as train_parser
from llava_fast.train.demo import PARTS

PARSERS = {
    "llava_fast.train": train_parser,
    "llava_fast.evaluate": build_parser,
    "llava_fast.data.scienceqa": scienceqa_parser,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_command_is_understood(recipe, capsys):
    for command in recipe.commands:
        _, _, module, *argv = shlex.split(command)
        PARSERS[module]().parse_args(argv)
    assert main(["recipes", recipe.name]) == 0
    assert recipe.figure in capsys.readouterr().out


def test_the_ablations_differ_in_what_they_say():
    commands = {recipe.name: "\n".join(recipe.commands) for recipe in RECIPES}
    assert len(set(commands.values())) == len(RECIPES)
    assert commands["last-layer"].count("--select-layer -1") == 2 and "--projector" not in commands["no-stage-1"]


def test_a_mixture(tmp_path, capsys):
    for name, count in (("a", 40), ("b", 60)):
        rows = [{"id": f"{name}{n}", "conversations": []} for n in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    argv = ["mixture", str(tmp_path / "a.json"), f"{tmp_path / 'b.json'}:0.05", "--out", str(tmp_path / "mix.json")]
    assert main(argv) == 0
    first = (tmp_path / "mix.json").read_text()
    ids = [row["id"] for row in json.loads(first)]
    assert ids[:40] == [f"a{n}" for n in range(40)] and len(ids) == 43
    assert main(argv) == 0 and (tmp_path / "mix.json").read_text() == first
    assert main(["mixture", f"{tmp_path / 'b.json'}:5", "--out", str(tmp_path / "mix.json")]) == 1
    assert "share from 0 to 1" in capsys.readouterr().err


def test_stage_1_as_a_checkpoint(tmp_path):
    fresh = join(PARTS / "vision", PARTS / "decoder", seed=5)
    save_projector(fresh, tmp_path / "projector.safetensors")
    parts = ["--vision-tower", str(PARTS / "vision"), "--decoder", str(PARTS / "decoder"), "--dtype", "float32"]
    rest = [
        "--projector",
        str(tmp_path / "projector.safetensors"),
        "--template",
        "v0",
        "--out",
        str(tmp_path / "model"),
    ]
    assert main(["assemble", *parts, *rest]) == 0
    model, processor = lf.load(tmp_path / "model")
    assert processor.template == "v0"
    assert torch.equal(model.projector.linear_1.weight, fresh.projector.linear_1.weight)
