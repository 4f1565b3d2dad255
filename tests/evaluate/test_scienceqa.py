"""ScienceQA: the paper's figures from the authors' answers, the parser's rules, both ensembles, the command line."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from llava_fast.evaluate import ensembles
from llava_fast.evaluate.__main__ import main
from llava_fast.evaluate.choices import find_choice, find_letter
from llava_fast.evaluate.columns import PAPER, columns_of, score
from llava_fast.evaluate.predictions import Predictions, choose, read_predictions, stored
from llava_fast.evaluate.scienceqa_prompts import PROMPTER, question_of, second_row
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import PARTS
from tests.evaluate.conftest import write_lines
from tests.realdata import real_data

FILES = {"LLaVA": "predictions_llava_13b_v0", "GPT-3.5 with CoT": "predictions_gpt3_cot"}


@pytest.fixture(scope="module")
def test_split():
    table = json.loads(real_data("scienceqa", "problems.json").read_bytes())
    members = json.loads(real_data("scienceqa", "pid_splits.json").read_bytes())["test"]
    return {pid: table[pid] for pid in members}


@pytest.mark.parametrize("name", FILES)
def test_stored_answers_give_the_rows_of_the_paper(name, test_split):
    predictions = read_predictions(real_data("scienceqa", f"{FILES[name]}.json"))
    expected = json.loads(real_data("scienceqa", "expected_scores.json").read_bytes())[f"{FILES[name]}_stored_results"]
    columns = score(test_split, stored(predictions, test_split).answers)
    assert {k: (v["correct"], v["count"]) for k, v in columns.items()} == {
        k: (v["correct"], v["count"]) for k, v in expected.items()
    }
    assert [round(v["accuracy"], 2) for v in columns.values()] == list(PAPER[name])


def test_texts_read_again_give_one_right_answer_less_than_the_random_draw(test_split):
    predictions = read_predictions(real_data("scienceqa", "predictions_llava_13b_v0.json"))
    chosen = choose(predictions, test_split)
    assert score(test_split, chosen.answers)["Avg"]["correct"] == 3855
    assert chosen.unparsed == ["3247"]
    drawn = choose(predictions, test_split, fallback="random", seed=3)
    assert drawn.answers["3247"] in (0, 1)
    assert drawn.answers == choose(predictions, test_split, fallback="random", seed=3).answers


def test_ensembles_against_a_few_lines(test_split):
    ours, theirs = (
        json.loads(real_data("scienceqa", f"{name}.json").read_bytes())["outputs"] for name in FILES.values()
    )

    def letter(text, choices):
        found = re.findall(r"The answer is ([A-Z]).", text)
        n = ord(found[0]) - 65 if len(found) == 1 else 99
        return n if n < (choices or 5) else None

    either = taken = asked = 0
    for pid, problem in test_split.items():
        a, b = (letter(texts[pid], len(problem["choices"])) for texts in (ours, theirs))
        taken += problem["answer"] == (a if b is None else b)
        either += problem["answer"] in (a, b)
        asked += a != b
    own, teacher = (choose(Predictions(texts), test_split).answers for texts in (ours, theirs))
    right = {pid: problem["answer"] for pid, problem in test_split.items()}
    assert score(test_split, ensembles.complement(own, teacher))["Avg"]["correct"] == taken
    assert ensembles.upper_bound(own, teacher, right) == either
    assert len(ensembles.differing(own, teacher)) == asked
    # A judge that says what the teacher said is the complement; one that says nothing is the model.
    assert ensembles.judged(own, teacher, teacher) == ensembles.complement(own, teacher)
    assert ensembles.judged(own, teacher, {}) == own


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" C \n", "C"),
        ("B. because it is", "B"),
        ("LECTURE: x\n The answer is D.", "D"),
        ("The answer is A. Or rather, The answer is B.", None),
        ("The answer is A", None),
        ("B because", None),
        ("", None),
        ("BA", None),
    ],
)
def test_rules_of_the_parser(text, letter):
    assert find_letter(text) == letter


def test_a_letter_that_is_no_choice_is_no_answer():
    assert find_choice("The answer is C.", 2) is None
    assert find_choice("The answer is C.", 3) == 2
    assert find_choice("The answer is Z.", 5) is None


def test_columns_of_a_problem_with_hint_and_picture():
    problem = {"subject": "natural science", "hint": "h", "image": "image.png", "grade": "grade7"}
    assert columns_of(problem) == ("NAT", "TXT", "IMG", "G7-12", "Avg")
    assert columns_of({**problem, "hint": "", "image": None, "grade": "grade6"}) == ("NAT", "NO", "G1-6", "Avg")


# ---- the command line on problems of our own


@pytest.fixture
def files(tmp_path):
    """Four problems, two with pictures; the right answer is always the second choice."""
    rows = {}
    for n in range(4):
        rows[str(n)] = {
            "question": f"Which one is {n}?",
            "choices": ["this", "that"],
            "answer": 1,
            "hint": "Look well." if n % 2 else "",
            "image": "image.png" if n < 2 else None,
            "grade": f"grade{5 + n}",
            "subject": "natural science",
            "lecture": "",
            "solution": "It is that.",
            "split": "test",
        }
        if n < 2:
            (tmp_path / "images" / "test" / str(n)).mkdir(parents=True)
            Image.new("RGB", (30, 30), (10, 90 * n, 60)).save(tmp_path / "images" / "test" / str(n) / "image.png")
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(rows)}))
    return tmp_path


def command(files, *more):
    data = ["--problems", files / "problems.json", "--splits", files / "pid_splits.json", "--json", files / "out.json"]
    return main([str(one) for one in ("scienceqa", *data, "--out", files / "run", *more)])


def scores(files):
    return json.loads((files / "out.json").read_text())


def predictions(files, letters):
    rows = [{"question_id": str(n), "text": f"Because.\nThe answer is {x}."} for n, x in enumerate(letters)]
    return write_lines(files / "answers.jsonl", rows)


def test_scores_a_file_of_answers(files, capsys):
    assert command(files, "--predictions", predictions(files, "BBAX")) == 0
    result = scores(files)
    assert result["columns"]["Avg"] == {"correct": 2, "count": 4, "accuracy": 50.0}
    assert result["columns"]["IMG"]["count"] == 2 and result["columns"]["SOC"]["accuracy"] is None
    assert result["unparsed"] == ["3"]
    assert sum(item["value"] for item in result["items"]) == 2
    assert "1 texts named no choice" in capsys.readouterr().out


def test_missing_answers_are_told_unless_left_out(files, capsys):
    path = predictions(files, "BB")
    assert command(files, "--predictions", path) == 1
    assert "2 of 4 problems have no text" in capsys.readouterr().err
    assert command(files, "--predictions", path, "--answered-only") == 0
    assert scores(files)["columns"]["Avg"]["count"] == 2


def test_teacher_answers_and_judges_over_http(files, served):
    def say(body):
        asked = body["messages"][-1]["content"]
        if "Answer of the first student" in asked:
            return "Both are wrong. The answer is B."
        return "The answer is A." if "is 2?" in asked or "is 3?" in asked else "I cannot tell."

    served.say = say
    options = ("--teacher-url", served.url, "--teacher-model", "m", "--shots", "0")
    assert command(files, "--predictions", predictions(files, "BABA"), *options) == 0
    found = scores(files)["ensembles"]
    assert found["teacher_unparsed"] == 2
    assert found["differing"] == found["judge_asked"] == 3  # 0 and 1 go unanswered by the teacher; 2 differs
    assert found["complement"]["Avg"]["correct"] == 1
    assert found["teacher_as_judge"]["Avg"]["correct"] == 3
    judged = [prompt for prompt in served.prompts if "first student" in prompt]
    assert all("Because.\nThe answer is" in prompt and "Options: (A) this (B) that" in prompt for prompt in judged)
    before = len(served.asked)
    assert command(files, "--predictions", files / "answers.jsonl", *options) == 0
    assert len(served.asked) == before  # all of it stood in the journals


def test_a_teacher_that_stores_choices_alone(files, served, capsys):
    (files / "teacher.json").write_text(json.dumps({"results": {"0": 1, "1": 0, "2": 1, "3": 1}}))
    argv = ("--predictions", predictions(files, "BBAA"), "--teacher-answers", files / "teacher.json")
    assert command(files, *argv) == 0
    found = scores(files)["ensembles"]
    assert (found["differing"], found["upper_bound"], found["complement"]["Avg"]["correct"]) == (3, 4, 3)
    assert command(files, *argv, "--teacher-url", served.url, "--teacher-model", "m") == 1
    assert "teacher.json has no text for 3 problems" in capsys.readouterr().err
    assert command(files, *argv[:2], "--judge-answers", files / "teacher.json") == 1
    assert "--teacher-answers" in capsys.readouterr().err


def machine(checkpoint, files):
    return (
        *("--model", checkpoint, "--images", files / "images", "--devices", "cpu", "--max-tokens", 6),
        *("--kv-cache-bytes", 1 << 23, "--max-sequences", 4),
    )


@pytest.mark.parametrize("style", ["reason-first", "two-pass", "zero-shot"])
def test_the_engine_answers(style, files, checkpoint):
    assert command(files, *machine(checkpoint, files), "--style", style) == 0
    result = scores(files)
    assert result["columns"]["Avg"]["count"] == 4 and not result["failed"]
    lines = [json.loads(line) for line in (files / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["0", "1", "2", "3"]
    assert all(("\n The answer is " in line["text"]) == (style == "two-pass") for line in lines)
    answers = (files / "run" / "answers.jsonl").read_bytes()
    assert command(files, *machine(checkpoint, files), "--style", style) == 0
    assert (files / "run" / "answers.jsonl").read_bytes() == answers  # nothing was answered again


def test_pictures_that_are_missing_are_told_before_the_model_is_loaded(files, checkpoint, capsys):
    (files / "images" / "test" / "1" / "image.png").unlink()
    assert command(files, *machine(checkpoint, files)) == 1
    assert "1 pictures are not under" in capsys.readouterr().err
    assert not (files / "run").exists()
    assert command(files, *machine(checkpoint, files), "--skip-missing") == 0
    assert scores(files)["columns"]["Avg"]["count"] == 3


def test_second_pass_continues_the_first(files, checkpoint):
    """Its tokens are those of the first prompt, the reasons and the prompter; the image stands once."""
    from llava_fast.checkpoint import config_of

    processor = Processor.from_config(config_of(checkpoint), Tokenizer.load(PARTS / "decoder"))
    problem = json.loads((files / "problems.json").read_text())["0"]
    row = second_row("0", problem, "It is small.", processor, image_last=True)
    assert row["image"] == "test/0/image.png"
    assert row["token_ids"].count(processor.image_token_id) == 1
    said = processor.decode([i for i in row["token_ids"] if i != processor.image_token_id])
    assert said.endswith("ASSISTANT: It is small." + PROMPTER)
    assert question_of(problem, "zero-shot").splitlines()[:3] == ["Which one is 0?", "A. this", "B. that"]
