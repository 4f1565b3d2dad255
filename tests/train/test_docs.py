"""docs/training.md: its commands are parsed by the programs they name. docs/scaling.md: its tables are computed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from benches import scaling
from llava_fast.train import __main__ as train
from llava_fast.train import memory, merge

DOCS = Path(__file__).parents[2] / "docs"
PARSERS = {
    "llava_fast.train": train.build_parser,
    "llava_fast.train.memory": memory.build_parser,
    "llava_fast.train.merge": merge.build_parser,
}


def commands() -> list[list[str]]:
    """The words of every command of the page that starts one of our modules."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / "training.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if " -m llava_fast" in line]


def test_commands_are_found():
    assert len(commands()) >= 12
    assert sum("torchrun" in words for words in commands()) == 4


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_are_parsed(words):
    at = words.index("-m")
    name, arguments = words[at + 1], words[at + 2 :]
    chosen = PARSERS[name]().parse_args(arguments)
    if name == "llava_fast.train":
        train.choose_recipe(chosen)  # what does not go together is refused here
        assert chosen.data
    if "torchrun" in words:
        launched = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        assert (launched.module, launched.training_script) == (True, name)
        assert launched.nproc_per_node == "8"


def test_memory_table_is_what_the_command_prints():
    """One row, which takes seconds."""
    (row,) = re.findall(r"\| `(--stage 2 --devices 8 --activation-checkpointing full)` \| ([\d.]+) \|", training())
    estimate = memory.of_preset(memory.build_parser().parse_args(row[0].split()))
    assert f"{estimate.total / 1e9:.1f}" == row[1]
    page = (DOCS / "scaling.md").read_text()
    parts = (estimate.weights, estimate.masters, estimate.moments, estimate.gradients, estimate.gathered, estimate.step)
    cells = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, estimate.total))
    assert f"| 7b | 2 | full | {cells} |" in page


def training() -> str:
    return (DOCS / "training.md").read_text()


def test_scaling_tables_are_computed(monkeypatch):
    """All but the table of memory, of which the test above takes a row."""
    monkeypatch.setattr(scaling, "memories", lambda: "MEMORY")
    computed = scaling.report().partition("### Memory")[0]
    assert computed in (DOCS / "scaling.md").read_text()
    assert computed.count("| 512 |") == 4


def test_a_wrong_number_is_one_line(capsys):
    assert memory.main(["--devices", "0"]) == 1
    assert capsys.readouterr().err == "error: --devices 0 and --max-tokens 8192 must be at least 1\n"
