"""docs/migration.md: every option of ours on the page exists in the command that the page gives it to."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

from llava_fast.train.recipe import RECIPES

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"
TRAIN = "llava_fast.train"
COMMAND = re.compile(r"python -m (llava_fast\.(?:evaluate [a-z-]+|[a-z_.]+))")


@cache
def help_of(command: str) -> str:
    name, *part = command.split()
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):  # what python -m runs of a package
        module = importlib.import_module(f"{name}.__main__")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        module.main([*part, "--help"])
    assert not ended.value.code
    return said.getvalue()


def claims() -> list[tuple[str, str]]:
    """(command, option) of every option in a table's right column; rows without a command belong to the last one."""
    found, command = [], TRAIN
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            command = TRAIN
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 2:
            continue
        named = COMMAND.search(cells[1])
        command = named[1] if named else command
        asked = command
        if cells[1].startswith("`--recipe scienceqa`"):  # its second option is the converter's
            found.append(("llava_fast.data.scienceqa", "--format"))
            cells[1] = "`--recipe scienceqa`"
        # Of the authors' are those with underscores, or said to be "theirs".
        ours = re.sub(r"`--version v0` of theirs|`--bits 8` is not there", "", cells[1])
        found += [(asked, option) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![a-z_])", ours)]
    return sorted(set(found))


def test_the_page_is_read_at_all() -> None:
    found = claims()
    assert ("llava_fast.train", "--lora-rank") in found
    assert ("llava_fast.train.merge", "--base") in found
    assert ("llava_fast.evaluate pope", "--answers") in found
    assert len(found) > 50


@pytest.mark.parametrize("command", sorted({command for command, _ in claims()}))
def test_options_exist(command: str) -> None:
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_of(command)))
    assert [option for asked, option in claims() if asked == command and option not in known] == []


def test_recipes_exist() -> None:
    named = set(re.findall(r"--recipe ([a-z0-9.-]+)", PAGE.read_text()))
    assert named == {name for name in RECIPES if not name.startswith("tiny")}
