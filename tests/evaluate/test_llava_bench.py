"""LLaVA-Bench: the authors' reviews give their figures; judging over HTTP, resumed, in both orders; the page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llava_fast.errors import ConfigError
from llava_fast.evaluate import relative
from llava_fast.evaluate.__main__ import main
from llava_fast.evaluate.bench import FILES, read_bench, scenes_bench
from llava_fast.evaluate.judge import f1, facts_of, judge_questions, judge_texts
from llava_fast.evaluate.llava_bench import image_name
from llava_fast.evaluate.reviews import ORDERS, Review, find_scores, read_reviews
from llava_fast.evaluate.wording import fill
from tests.evaluate.conftest import completion, write_lines
from tests.realdata import real_data

PUBLISHED = {  # the authors' summary of their own review files, in percent
    "eval1": {"all": 72.8, "complex": 82.8, "conv": 74.7, "detail": 52.6},
    "eval2": {"all": 72.7, "complex": 83.7, "conv": 74.7, "detail": 51.1},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_authors_reviews_give_their_figures(name):
    reviews = read_reviews([real_data("llava_bench_wild", f"reviews_llava-v1.5-13b-{name}.jsonl")])
    assert {k: round(v.relative, 1) for k, v in relative.score(reviews).items()} == PUBLISHED[name]
    lines = real_data("llava_bench_wild", f"reviews_llava-v1.5-13b-{name}.jsonl").read_text().splitlines()
    assert [list(review.scores) for review in reviews] == [json.loads(line)["tuple"] for line in lines]


@pytest.mark.parametrize("name", ["review_bard_vicuna-13b", "review_gpt35_vicuna-13b"])
def test_all_stored_reviews_parse_but_the_three_known_ones(name):
    path = real_data("judge_reviews", f"{name}.jsonl")
    stored = {row["question_id"]: row["score"] for row in map(json.loads, path.read_text().splitlines())}
    reviews = read_reviews([path])
    assert [review.question_id for review in reviews if review.scores is None] == ["68", "69", "70"]
    assert all(list(r.scores) == stored[int(r.question_id)] for r in reviews if r.scores is not None)


def test_the_coco_set_is_whole():
    items = read_bench(*(real_data("llava_bench_coco", name) for name in FILES["coco"]))
    assert len(items) == 90 and len({item.image for item in items}) == 30
    first = items[0].context.split("\n\n")
    assert len(first[0].splitlines()) == 5
    assert first[1].splitlines()[0] == "suitcase: [0.167, 0.025, 0.989, 0.445]"


@pytest.mark.parametrize(
    ("line", "scores"),
    [
        ("8 9.5", (8.0, 9.5)),
        ("8, 9", (8.0, 9.0)),
        ("8,9", (8.0, 9.0)),
        (" 8   9 ", (8.0, 9.0)),
        ("8", None),
        ("8 9 10", None),
        ("Assistant 1: 8", None),
        ("8/10 9/10", None),
        ("nan 3", None),
        ("-1 -1", None),
        ("", None),
    ],
)
def test_the_first_line_holds_two_scores_or_none(line, scores):
    assert find_scores(line + "\nBecause 3 4.") == scores


def review(number, scores, *, run=0, order=ORDERS[0], category="conv"):
    return Review(str(number), category, scores, run, order, "")


def test_the_score_is_a_ratio_of_means_and_failures_are_left_out():
    reviews = [review(0, (10.0, 5.0)), review(1, (2.0, 2.0)), review(2, None)]
    assert relative.score(reviews)["all"].relative == pytest.approx(100 * 7 / 12, abs=0.01)
    original = relative.score(reviews, unparsable="as-original")["all"]
    assert original.relative == pytest.approx(100 * (5 + 2 - 1) / (10 + 2 - 1), abs=0.01) and original.count == 3


def test_mean_and_deviation_are_over_runs():
    runs = relative.by_run([review(0, (10.0, 6.0)), review(0, (10.0, 8.0), run=1)])
    assert relative.spread(runs.values())["all"] == relative.Spread(70.0, pytest.approx(14.142, abs=1e-3))


def test_position_bias():
    reviews = [
        *(review(0, (9.0, 7.0)), review(0, (7.0, 9.0), order=ORDERS[1])),  # whoever stands first gains 2 and wins
        *(review(1, (8.0, 4.0)), review(1, (8.0, 4.0), order=ORDERS[1])),  # no effect
        review(2, (5.0, 5.0)),  # not in both orders
    ]
    bias = relative.position_bias(reviews)
    assert (bias.pairs, bias.turned, bias.first_gain) == (2, 1, 1.0)
    assert relative.position_bias(reviews[:1]) is None


def test_what_is_put_into_a_prompt_is_not_searched_for_places():
    assert fill("{question} {first} {other}", question="{first}", first="x") == "{first} x {other}"


def test_the_reference_stands_first_unless_both_orders_are_asked_for():
    items = scenes_bench_of(3)
    texts = judge_texts("coco", None, None)
    answers = {item.id: f"<<{item.id}>>" for item in items}
    (one, *_), both = (judge_questions(items, answers, texts, runs=2, both_orders=b) for b in (False, True))
    prompt = one.messages[-1]["content"]
    assert prompt.index(items[0].context) < prompt.index(items[0].reference) < prompt.index("<<0>>")
    assert len(both) == 2 * 2 * 3 and len({question.key for question in both}) == 12
    swapped = next(question for question in both if question.key == f"0/0/{ORDERS[1]}").messages[-1]["content"]
    assert swapped.index("<<0>>") < swapped.rindex(items[0].reference)


# ---- the built-in scenes


def scenes_bench_of(count):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return scenes_bench(count, Path(folder))


def test_the_rule_counts_facts():
    right = facts_of("There are two shapes. A small red star is at the top left.")
    assert right == {"two": 1, "small": 1, "red": 1, "star": 1, "top left": 1}
    assert f1(right, right) == 1.0
    assert f1(right, facts_of("There are two shapes.")) == pytest.approx(2 / 6)
    assert facts_of("Yes, there is a red star.", facts_of("Is there a red star?")) == {"yes": 1}


def test_the_rule_gives_the_reference_full_marks_and_another_answer_fewer(tmp_path):
    items = scenes_bench_of(12)
    same = [{"question_id": item.id, "text": item.reference} for item in items]
    turned = [
        {"question_id": item.id, "text": other.reference}
        for item, other in zip(items, items[3:] + items[:3], strict=True)
    ]
    for name, rows in (("same", same), ("turned", turned)):
        answers = write_lines(tmp_path / f"{name}.jsonl", rows)
        out = ("--out", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json"))
        assert main(["llava-bench", "--set", "scenes", "--count", "12", "--answers", str(answers), *out]) == 0
    figures = [json.loads((tmp_path / f"{name}.json").read_text())["metrics"]["all"] for name in ("same", "turned")]
    assert figures[0] == 100.0 and figures[1] < 80.0


def test_a_model_answers_scenes_and_is_judged(tmp_path, checkpoint):
    machine = ("--devices", "cpu", "--max-tokens", "4", "--kv-cache-bytes", str(1 << 22), "--max-sequences", "4")
    argv = [
        "llava-bench",
        "--set",
        "scenes",
        "--count",
        "3",
        "--model",
        str(checkpoint),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*argv, *machine]) == 0
    for name in ("answers.jsonl", "reviews.jsonl", "result.json", "scores.png", "page.html"):
        assert (tmp_path / "run" / name).stat().st_size
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["subject"]["checkpoint"] and result["versions"]["torch"] and len(result["items"]) == 3


# ---- judged over HTTP


def command(bench, served, *more):
    judge = () if served is None else ("--judge-url", served.url, "--judge-model", "m", "--judge-tries", "3")
    files = ("--bench", bench, "--answers", bench.parent / "answers.jsonl", "--out", bench.parent / "run")
    return [str(one) for one in ("llava-bench", "--set", "wild", *files, *judge, *more)]


def test_a_judge_over_http(bench, served, tmp_path, capsys):
    assert main(command(bench, served, "--runs", "2", "--json", tmp_path / "out.json")) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["metrics"] == {"conv": 75.0, "detail": 75.0, "complex": 75.0, "all": 75.0}
    assert len(served.asked) == 12 and all(body["temperature"] == 0.2 for body in served.asked)
    assert all(
        p.index("Told") < p.index("Question") < p.index("Reference") < p.index("Candidate") for p in served.prompts
    )
    assert "75.0±0.0" in capsys.readouterr().out
    reviews = read_reviews([tmp_path / "run" / "reviews.jsonl"])  # the journal is a review file
    assert len(reviews) == 12 and {r.run for r in reviews} == {0, 1}
    assert main(["llava-bench", "--reviews", str(tmp_path / "run" / "reviews.jsonl")]) == 0


def test_runs_and_orders_are_added_to_a_finished_journal(bench, served):
    assert main(command(bench, served)) == 0
    assert main(command(bench, served, "--runs", "2", "--both-orders")) == 0
    assert len(served.asked) == 24  # the first six were not asked again


def test_pictures_are_found_under_the_name_that_coco_gives_them(tmp_path):
    (tmp_path / "COCO_val2014_1.jpg").touch()
    (tmp_path / "2.jpg").touch()
    assert image_name(tmp_path, "1.jpg") == "COCO_val2014_1.jpg"
    assert image_name(tmp_path, "2.jpg") == "2.jpg" and image_name(None, "3.jpg") == "3.jpg"


def test_scores_follow_the_answers_in_either_order(bench, served, tmp_path):
    served.say = lambda body: "9 3" if (p := body["messages"][-1]["content"]).index("Ref") < p.index("Cand") else "3 9"
    assert main(command(bench, served, "--both-orders", "--json", tmp_path / "out.json")) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["metrics"]["all"] == pytest.approx(100 / 3, abs=0.01)
    assert result["position_bias"] == {"pairs": 6, "relative": [pytest.approx(33.3, abs=0.1)] * 2} | {
        "first_gain": 0.0,
        "turned": 0,
    }


def test_a_judge_that_prefers_the_first_shows(bench, served, tmp_path):
    assert main(command(bench, served, "--both-orders", "--json", tmp_path / "out.json")) == 0  # always "8 6"
    bias = json.loads((tmp_path / "out.json").read_text())["position_bias"]
    assert (bias["first_gain"], bias["turned"]) == (2.0, 6)


def test_faults_of_the_server_are_tried_again(bench, served, monkeypatch):
    monkeypatch.setattr("llava_fast.teacher.random.uniform", lambda *_: 0.0)  # no pauses
    served.faults = [(500, "{}"), (200, "not JSON"), (200, '{"choices": []}'), (503, ""), (200, completion("5 5")[:30])]
    assert main(command(bench, served)) == 0
    assert len(served.asked) == 6


def test_unparsable_reviews_are_counted_and_left_out(bench, served, tmp_path, capsys):
    served.say = lambda body: "I will not." if "Question 4?" in body["messages"][-1]["content"] else "10 5"
    assert main(command(bench, served, "--json", tmp_path / "out.json")) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["metrics"]["all"] == 50.0
    assert [one["question_id"] for one in result["unparsable"]] == ["4"]
    assert "1 of 6 reviews hold no two scores, left out: questions 4" in capsys.readouterr().err
    assert main(command(bench, served, "--unparsable", "as-original", "--json", tmp_path / "out.json")) == 0
    assert json.loads((tmp_path / "out.json").read_text())["metrics"]["all"] == pytest.approx(2400 / 49, abs=0.05)


def test_a_wrong_key_stops_at_once_and_the_run_goes_on_later(bench, served, capsys):
    served.faults = [(401, '{"error": {"message": "bad key"}}')] * 50
    assert main(command(bench, served)) == 1
    assert "bad key" in capsys.readouterr().err
    served.faults = []
    assert main(command(bench, served)) == 0


def test_only_what_is_missing_is_asked_again(bench, served, tmp_path):
    assert main(command(bench, served)) == 0
    journal = tmp_path / "run" / "reviews.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[:4]) + whole[4][:20])  # as a kill leaves it
    before = len(served.asked)
    assert main(command(bench, served)) == 0
    assert len(served.asked) == before + 2
    assert len(read_reviews([journal])) == 6


def test_kill_and_restart_ask_everything_exactly_once(bench, served, tmp_path):
    def slow(body):
        time.sleep(0.15)
        return "8 6"

    served.say = slow
    argv = [sys.executable, "-m", "llava_fast.evaluate", *command(bench, served, "--runs", "4", "--judge-at-once", "1")]
    journal = tmp_path / "run" / "reviews.jsonl"
    process = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    served.say = lambda body: "8 6"
    kept = journal.read_bytes().count(b"\n")
    before = len(served.asked)
    assert 3 <= kept < 24
    assert main(command(bench, served, "--runs", "4", "--judge-at-once", "1")) == 0
    assert len(served.asked) - before == 24 - kept
    assert len(read_reviews([journal])) == 24


def test_an_interrupt_keeps_what_is_under_way(bench, served, tmp_path):
    def say(body):
        if len(served.asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return "8 6"

    served.say = say
    argv = command(bench, served, "--judge-at-once", "1", "--runs", "4")
    assert main(argv) == 130
    kept = (tmp_path / "run" / "reviews.jsonl").read_bytes().count(b"\n")
    assert kept == len(served.asked) < 24
    served.say = lambda body: "8 6"
    assert main(argv) == 0 and len(served.asked) == 24


def test_a_journal_of_another_run_is_refused(bench, served, tmp_path, capsys):
    assert main(command(bench, served)) == 0
    write_lines(tmp_path / "answers.jsonl", [{"question_id": n, "text": "Another"} for n in range(6)])
    assert main(command(bench, served)) == 1
    assert "holds lines of another run" in capsys.readouterr().err
    assert main(command(bench, served, "--overwrite")) == 0


def test_mistakes_are_told_before_anything_is_asked(bench, served, capsys):
    assert main(command(bench, None)) == 1
    assert "nobody judges" in capsys.readouterr().err
    (bench.parent / "prompt.txt").write_text("{context} {question} {first}")
    assert main(command(bench, served, "--judge-prompt", bench.parent / "prompt.txt")) == 1
    assert "has no place {second}" in capsys.readouterr().err
    write_lines(bench.parent / "answers.jsonl", [{"question_id": 0, "text": "x"}])
    assert main(command(bench, served)) == 1
    assert "lacks 5 of 6 answers" in capsys.readouterr().err
    assert not served.asked


def test_a_torn_reviews_file_is_told(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"question_id": 1, "content": "8 9"}\n{"question_id"')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        read_reviews([path])


def test_the_page_holds_everything_and_nothing_in_it_can_run(bench, served, tmp_path):
    nasty = "</script><script>alert(1)</script>"
    write_lines(tmp_path / "answers.jsonl", [{"question_id": n, "text": nasty} for n in range(6)])
    assert main(command(bench, served)) == 0
    page = (tmp_path / "run" / "page.html").read_text()
    assert page.count("<script") == 2 and "http://" not in page and "https://" not in page
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["items"][0]["answers"][-1] == {"who": "candidate", "text": nasty, "score": 6.0}
    assert data["items"][0]["picture"].startswith("data:image/jpeg;base64,")


def test_a_dry_run_prints_the_prompt_and_asks_nobody(bench, served, capsys):
    assert main(command(bench, served, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "Told 0" in printed and "Reference 0" in printed and not served.asked
