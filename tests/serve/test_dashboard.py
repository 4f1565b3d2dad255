"""docs/grafana.json asks for nothing that the server's /metrics does not have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import user

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {one["name"]: one["query"]["query"] for one in DASHBOARD["templating"]["list"]}
BY_PROMETHEUS = {"instance", "job"}  # it adds these labels itself
WORDS = {"histogram_quantile", "sum", "max", "by", "rate"}  # of its language
NUMBER = re.compile(r"(?P<name>[a-z_][a-z0-9_:]+)\{(?P<labels>[^}]*)\}")


@pytest.fixture(scope="module")
def samples(server) -> dict[str, set[str]]:
    """Labels by name of each number that a server has once it has answered something."""
    asked = {"messages": user("Hi"), "max_tokens": 3}
    assert httpx.post(server.url + "/v1/chat/completions", json=asked).status_code == 200
    text = httpx.get(server.url + "/metrics").text
    return {s.name: set(s.labels) for family in text_string_to_metric_families(text) for s in family.samples}


@pytest.mark.parametrize("query", QUERIES)
def test_query(samples, query):
    numbers = {match["name"]: match["labels"] for match in NUMBER.finditer(query)}
    assert numbers
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", NUMBER.sub("", query))
    by = set(re.findall(r"\bby \((\w+)\)", query))
    assert set(re.findall(r"[a-z_:]+", bare)) <= WORDS | by  # nothing that the pattern above has missed
    for name, labels in numbers.items():
        assert name in samples
        found = re.findall(r'(\w+)=~"\$(\w+)"', labels)
        assert len(found) == labels.count("=")
        asked = by | {label for label, _ in found}
        assert asked - BY_PROMETHEUS <= samples[name], name
        assert {variable for _, variable in found} <= set(VARIABLES)
        assert query.count("rate(") == query.count("[$__rate_interval]")
        counts = name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert counts == ("rate(" in query), "counters are asked for their rate, and nothing else is"


def test_variables(samples):
    for query in VARIABLES.values():
        name, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", query).groups()
        assert label in samples[name] | BY_PROMETHEUS


def test_panels_lie_beside_each_other():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
