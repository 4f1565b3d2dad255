"""benches/load_serve.py for a few seconds."""

from __future__ import annotations

from benches.load_serve import measure


def test_load():
    found = measure(clients=8, seconds=3, kinds=6)
    assert found["right"] > 10 and found["wrong"] == [] and found["unanswered"] == 0, found
    assert found["left_by_clients"] > 0 and found["refused"] > 0
    after, before = found["after"], found["before"]
    assert after["running"] == after["waiting"] == after["cache_use"] == 0
    assert after["tasks"] <= before["tasks"] and after["sockets"] <= before["sockets"]
    assert after["memory_mb"] < before["memory_mb"] + 100
    assert found["sigterm"]["lost"] == [] and found["sigterm"]["exit_code"] == 0 and found["server_errors"] == []
    assert found["sigterm"]["turned_away"] > 0
