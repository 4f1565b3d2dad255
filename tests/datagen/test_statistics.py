"""The statistics page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from llava_fast.datagen.__main__ import main
from llava_fast.datagen.instructions import openings


def test_page(tmp_path):
    def sample(number, kind, *turns):
        values = [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]
        return {"id": f"{number}-{kind}", "image": f"{number % 2}.jpg", "conversations": values}

    rows = [sample(n, "conversation", ("<image>\nWhat is it?", "one two three"), ("Why?", "one")) for n in range(4)]
    rows += [sample(9, "x<y", ("Describe the <b>scene</b>.\n<image>", "word " * 50))]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    page = tmp_path / "page.html"
    assert main(["statistics", str(tmp_path / "data.json"), "--out", str(page)]) == 0
    text = page.read_text()
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", text)]
    assert cells[:9] == ["conversation", "4", "2", "8", "2", "2.0", "2.0", "3", "100.0%"]
    assert cells[9:] == ["data", "1", "1", "1", "1", "3.0", "50.0", "50", "0.0%"]
    assert "http" not in text.replace("data:image", "") and text.count("data:image/png") == 2
    HTMLParser().feed(text)


def test_openings():
    questions = [
        "How many dogs are there?",
        "What is the man doing?",
        "Describe the scene.",
        "Why?",
        "",
        "How many dogs?",
    ]
    assert openings(questions) == {
        ("how many", "dogs"): 2,
        ("what", "man"): 1,
        ("describe", "scene"): 1,
        ("why", "..."): 1,
    }
