"""From a line to a request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llava_fast as lf
from llava_fast.errors import InvalidRequestError
from llava_fast.generate.prompts import Line, read, survey
from llava_fast.generate.requests import id_of, parse, request_of


def request(row, number=1, defaults=None, seed=0, image_dir=Path("/pictures")) -> lf.Request:
    return request_of(row, number, defaults=defaults or {}, seed=seed, image_dir=image_dir)


def image(path) -> dict:
    return {"type": "image", "image": path}


TEXT = {"type": "text", "text": "Why?"}


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"prompt": "Why?"}, [TEXT]),
        ({"prompt": "Why?", "image": None}, [TEXT]),
        ({"prompt": "Why?", "image": "a.png"}, [image(Path("/pictures/a.png")), TEXT]),
        ({"prompt": "Why?", "image": "/b/a.png"}, [image(Path("/b/a.png")), TEXT]),
        ({"prompt": "Why?", "image": ["1", "2"]}, [image(Path("/pictures/1")), image(Path("/pictures/2")), TEXT]),
        ({"question_id": 7, "image": "001.jpg", "text": "Why?"}, [image(Path("/pictures/001.jpg")), TEXT]),
        ({"messages": [{"role": "user", "content": [TEXT, image("a")]}]}, [TEXT, image(Path("/pictures/a"))]),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "Why?"),
    ],
)
def test_forms(row, content):
    assert request(row).messages == [{"role": "user", "content": content}]


def test_ids():
    assert id_of({"id": "a"}, 3) == "a"
    assert id_of({"id": 0}, 3) == 0
    assert id_of({"question_id": 9}, 3) == 9
    assert id_of({"id": None}, 3) == id_of({}, 3) == 3


def test_sampling_of_a_line_goes_over_the_defaults():
    row = {"prompt": "x", "sampling": {"temperature": 0.5, "stop": ["."], "logit_bias": {"7": -1.5}}}
    sampling = request(row, defaults={"max_tokens": 9, "temperature": 1.0}).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.stop) == (9, 0.5, (".",))
    assert sampling.logit_bias == {7: -1.5}


def test_seeds():
    """A line's draws follow from the run's seed and the line's number alone, unless it has its own."""
    seeds = [request({"prompt": "x"}, number, seed=seed).sampling.seed for seed in (0, 1) for number in (1, 2, 1)]
    assert seeds[0] == seeds[2] and len({*seeds}) == 4
    assert request({"prompt": "x", "sampling": {"seed": 5}}).sampling.seed == 5


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ("{", "line 4 is not JSON"),
        ("[1]", "must be a JSON object"),
        ("[" * 100_000, "line 4 is not JSON"),
        (b"\xff", "line 4 is not JSON"),
        ("{}", "needs 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": []}, "needs 'prompt' or 'messages', and not both"),
        ({"prompt": 5}, "'prompt' is 5"),
        ({"messages": "x"}, "must be a list of objects"),
        ({"messages": ["x"]}, "must be a list of objects"),
        ({"messages": [], "image": "a.png"}, "put it into a message"),
        ({"prompt": "x", "temperature": 1}, "'temperature' stands beside the prompt; put it under 'sampling'"),
        ({"prompt": "x", "sampling": {"heat": 1}}, "'heat', which is none of max_tokens"),
        ({"prompt": "x", "sampling": [1]}, "must be an object"),
        ({"prompt": "x", "sampling": {"stop": 5}}, "cannot be understood"),
        ({"prompt": "x", "sampling": {"logit_bias": [1]}}, "cannot be understood"),
        ({"prompt": "x", "sampling": {"max_tokens": 0}}, "max_tokens=0 must be"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(raw, cause):
    raw = json.dumps(raw) if isinstance(raw, dict) else raw
    with pytest.raises(InvalidRequestError, match=cause.replace("'", ".")):
        request(parse(Line(4, raw.encode() if isinstance(raw, str) else raw)))


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"b": 2}\r\n{"c": 3}')
    found = survey(path)
    assert (found.prompts, found.lines) == (3, 5)
    lines = read(path, lambda number: number == 4)
    assert next(lines) == Line(1, b'{"a": 1}\n')
    assert [line.number for line in lines] == [5]
    path.write_bytes(path.read_bytes() + b" ")
    assert survey(path).digest != found.digest
