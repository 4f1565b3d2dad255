"""Stage-1 data from captions, and the choice by noun phrases."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest

from llava_fast.datagen.__main__ import main
from llava_fast.datagen.noun_phrases import choose


def test_choice_keeps_the_rule():
    """What the paper's text asks of the pool, checked for every phrase and caption."""
    rng = Random(1)
    names = [f"p{n}" for n in range(60)]
    captions = [[name for n, name in enumerate(names) if rng.random() < (n / 60) ** 3] for _ in range(400)]
    counts = Counter(name for caption in captions for name in set(caption))
    kept = set(choose(captions, fewest=3, most=20, seed=1))
    for name, count in counts.items():
        holding = [n for n, caption in enumerate(captions) if name in caption]
        if 3 <= count <= 20:
            assert kept >= set(holding)  # rare phrases keep all their captions
        elif count > 20:
            assert len(kept & set(holding)) >= 20
    for n, caption in enumerate(captions):
        if not any(counts[name] >= 3 for name in caption):
            assert n not in kept  # nothing but what fewer than three hold
    assert choose(captions, most=20, seed=1) == sorted(kept) != choose(captions, most=20, seed=2)
    everything = {n for n, caption in enumerate(captions) if any(counts[name] >= 3 for name in caption)}
    assert len(kept) < len(everything) and set(choose(captions, most=400)) == everything


def test_a_phrase_counts_once_a_caption():
    assert choose([["cat", "cat", "cat"], ["dog"], ["dog"], ["dog"]]) == [1, 2, 3]


def read(path):
    return json.loads(path.read_text())


def test_cc3m_list(tmp_path, capsys):
    (tmp_path / "cc3m.tsv").write_text('a "quoted cat\thttp://x\nthe sea at night\thttp://y\na dog\thttp://z\n')
    out, images = tmp_path / "out.json", tmp_path / "images"
    options = ["captions", "--cc3m", str(tmp_path / "cc3m.tsv"), "--out", str(out)]
    assert main(options) == 0
    assert [row["conversations"][1]["value"] for row in read(out)] == ['a "quoted cat', "the sea at night", "a dog"]
    assert read(out)[2]["image"] == "GCC_train_000000002.jpg"
    images.mkdir()
    (images / "GCC_train_000000001.jpg").touch()
    assert main([*options, "--images", str(images)]) == 0
    assert [row["image"] for row in read(out)] == ["GCC_train_000000001.jpg"]
    (tmp_path / "cc3m.tsv").write_text("a cat\thttp://x\n\thttp://y\n")
    assert main(options) == 2 and "line 2: no caption" in capsys.readouterr().err


def test_every_caption(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"id": "a", "image": "a.jpg", "captions": ["x", "y", "z"]}]))
    options = ["captions", "--pictures", str(tmp_path / "p.json"), "--out", str(tmp_path / "out.json")]
    assert main(options) == 0
    assert len(read(tmp_path / "out.json")) == 1
    assert main([*options, "--every-caption"]) == 0
    rows = read(tmp_path / "out.json")
    assert [row["conversations"][1]["value"] for row in rows] == ["x", "y", "z"]
    assert len({row["id"] for row in rows}) == 3 and {row["image"] for row in rows} == {"a.jpg"}


def test_noun_phrases_of_spacy(tmp_path, capsys):
    """With spaCy and its small pipeline; they are an extra."""
    spacy = pytest.importorskip("spacy")
    if not spacy.util.is_package("en_core_web_sm"):
        pytest.skip("spaCy has no en_core_web_sm")
    from llava_fast.datagen.noun_phrases import spacy_phrases

    (found,) = spacy_phrases("en_core_web_sm")(["The red bus stops near a small station."])
    assert found == ["red bus", "small station"]


def test_filter_without_spacy_says_what_to_install(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "spacy", None)
    (tmp_path / "cc3m.tsv").write_text("a cat\thttp://x\n")
    assert main(["captions", "--cc3m", str(tmp_path / "cc3m.tsv"), "--noun-phrases", "--out", str(tmp_path / "o")]) == 2
    assert "llava-fast[cc3m]" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
