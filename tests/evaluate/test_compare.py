"""Two results side by side: figures from the items, intervals against what statistics say of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llava_fast.evaluate.__main__ import main
from llava_fast.evaluate.compare import compare
from llava_fast.evaluate.results import Item, figures, result


def accuracy_items(right, offset=0):
    return [Item(str(n + offset), ("all",), float(r), 1.0) for n, r in enumerate(right)]


def write(path, items, benchmark="scienceqa"):
    whole = result(benchmark, subject={}, data=[], settings={}, items=items, command=[])
    path.write_text(json.dumps(whole))
    return str(path)


def test_figures_are_ratios_of_sums():
    items = [Item("a", ("x", "all"), 5.0, 10.0), Item("b", ("all",), 2.0, 2.0)]
    assert figures(items) == {"x": 50.0, "all": pytest.approx(100 * 7 / 12)}


def test_the_interval_is_that_of_a_binomial():
    rng = np.random.default_rng(0)
    a, b = (accuracy_items(rng.random(1000) < p) for p in (0.6, 0.7))
    found = compare(list(zip(a, b, strict=True)), draws=4000, seed=1)["all"]
    p = found["a"]["value"] / 100
    half = 196 * np.sqrt(p * (1 - p) / 1000)  # percent
    assert found["a"]["low"] == pytest.approx(100 * p - half, abs=0.35)
    assert found["a"]["high"] == pytest.approx(100 * p + half, abs=0.35)
    assert found["difference"]["value"] == pytest.approx(found["b"]["value"] - found["a"]["value"])


def test_equal_results_do_not_differ_and_shared_questions_count_alone(tmp_path, capsys):
    right = [True, False] * 20
    a = write(tmp_path / "a.json", accuracy_items(right))
    b = write(tmp_path / "b.json", accuracy_items(right, offset=0)[:30] + accuracy_items(right, offset=100))
    assert main(["compare", a, b, "--json", str(tmp_path / "c.json")]) == 0
    whole = json.loads((tmp_path / "c.json").read_text())
    assert whole["questions"] == 30
    assert whole["groups"]["all"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "*" not in capsys.readouterr().out


def test_unlike_things_are_not_compared(tmp_path, capsys):
    a, b = write(tmp_path / "a.json", accuracy_items([1])), write(tmp_path / "b.json", accuracy_items([1]), "pope")
    assert main(["compare", a, b]) == 1
    assert "compare like" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    assert main(["compare", a, str(tmp_path / "x.json")]) == 1
    assert "give a file that --json wrote" in capsys.readouterr().err
