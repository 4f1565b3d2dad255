"""The file of answers: resumption, repair, and whose it is."""

from __future__ import annotations

import json

import pytest

from llava_fast.errors import ConfigError
from llava_fast.generate.output import Output

RUN = {"input": "abc", "sampling": {"max_tokens": 4}, "seed": 0}


def answer(line: int, text: str | None = "yes", error=None) -> dict:
    return {"line": line, "id": line, "text": text, "error": error}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "out.jsonl"


def write(path, *answers, run=RUN, lines=9, **options) -> Output:
    """Open, write, close."""
    output = Output(path, run, lines, **options)
    output.write(list(answers))
    output.close()
    return output


def test_goes_on(path):
    write(path, answer(3), answer(1, None, {"type": "ImageError", "message": "?"}))
    output = write(path, answer(2, "\u00e9\ud800\u2028"))
    assert (output.answered, output.errors) == (2, 1)
    assert [output.is_done(n) for n in range(1, 5)] == [True, True, True, False]
    texts = [json.loads(line)["text"] for line in path.read_text().split("\n")[:-1]]
    assert texts == ["yes", None, "\u00e9\ud800\u2028"]


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_half_written_line_is_cut_off(path, size):
    write(path, answer(1))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(answer(2, "x" * size)).encode()[:-5])
    output = write(path)
    assert (output.answered, output.is_done(2)) == (1, False)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # the only line is half
    assert write(path).answered == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("bad", [b"nonsense\n", b"[]\n", b'{"line": 10, "error": null}\n', b'{"line": 1}\n', b"\n"])
def test_damage_is_named(path, bad):
    write(path, answer(1))
    path.write_bytes(path.read_bytes() + bad)
    with pytest.raises(ConfigError, match=r"line 2 of .*out.jsonl is no answer.*delete that line"):
        write(path)


def test_answers_of_another_run_are_not_touched(path):
    write(path, answer(1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"seed: 0 then, 1 now.*--overwrite"):
        write(path, run={**RUN, "seed": 1})
    assert path.read_bytes() == before
    assert write(path, run={**RUN, "seed": 1}, overwrite=True).answered == 0
    assert write(path, run={**RUN, "seed": 1}).answered == 0  # the new run's from now on


def test_a_file_of_another_program_is_not_touched(path):
    path.parent.mkdir()
    path.write_text("precious\n")
    with pytest.raises(ConfigError, match=r"no out.jsonl.run.json says which run wrote it"):
        write(path)
    assert path.read_text() == "precious\n"


def test_errors_can_be_done_again(path):
    write(path, answer(1), answer(2, None, {"type": "StepError", "message": "?"}), answer(3))
    output = write(path, retry=True)
    assert (output.answered, output.errors, output.is_done(2)) == (2, 0, False)
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [1, 3]
    assert {p.name for p in path.parent.iterdir()} == {"out.jsonl", "out.jsonl.run.json"}


def test_one_writer(path):
    first = Output(path, RUN, 9)
    with pytest.raises(ConfigError, match="another process is writing"):
        Output(path, RUN, 9, overwrite=True)
    first.close()
    write(path)
