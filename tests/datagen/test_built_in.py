"""The built-in teacher and its data, which must be true of the pictures and train."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from llava_fast.data.samples import load_samples
from llava_fast.data.scenes import CAPTION_REQUESTS, DETAIL_REQUESTS, detail, scene_at
from llava_fast.datagen.__main__ import main
from llava_fast.datagen.built_in import scene_pictures
from llava_fast.datagen.kinds import KINDS
from llava_fast.datagen.prompting import read_prompts
from llava_fast.datagen.rule_teacher import RuleTeacher
from llava_fast.processor import Tokenizer
from llava_fast.processor.conversation import encode_conversation
from llava_fast.teacher import TeacherError
from llava_fast.train.demo import PARTS


def told(messages):
    text = str(RuleTeacher().answer(messages))
    blocks = [block.split(":\n", 1)[1].strip() for block in text.split("===\n")]
    return list(zip(blocks[::2], blocks[1::2], strict=True))


def test_answers_are_true_of_the_scenes():
    prompts = read_prompts()
    for index, picture in enumerate(scene_pictures(200, 3)):
        scene, rng = scene_at(3, index)
        by_form = {shape.form: shape for shape in scene.shapes}
        text = RuleTeacher().answer(prompts.messages(KINDS["detail"], picture))
        assert text == detail(scene, rng)[0][1]
        turns = told(prompts.messages(KINDS["conversation"], picture))
        assert len(turns) == 6
        for question, answer in turns:
            words = question.rstrip("?").split()
            if question.startswith("What color"):
                assert answer.rstrip(".").split()[-1] == by_form[words[-1]].color
            elif question.startswith("Where"):
                assert answer.endswith(f"at the {by_form[words[-1]].place}.")
            elif words[-1] == "large":
                assert answer.rstrip(".").split()[-1] == by_form[words[2]].size
            elif question.startswith("Is there"):
                there = {shape.form for shape in scene.shapes} | {f"{shape.color} shape" for shape in scene.shapes}
                assert answer.startswith("Yes") == (" ".join(words[3:]) in there)
        ((question, answer),) = told(prompts.messages(KINDS["reasoning"], picture))
        if question.startswith(("Which is higher", "Which is further")):
            first, second = (by_form[form] for form in re.findall(r"the (\w+)(?= or|\?)", question))
            axis = "row" if "higher" in question else "column"
            assert answer.split("So the ")[1].split()[0] == min((first, second), key=lambda s: getattr(s, axis)).form


def test_knows_nothing_else():
    with pytest.raises(TeacherError, match="knows the built-in scenes alone"):
        RuleTeacher().answer([{"content": "x"}, {"content": "A cat on a mat."}])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    assert main(["--scenes", "60", "--rules", "--in-turn", "--out", str(folder)]) == 0
    assert main(["captions", "--scenes", "60", "--out", str(folder / "captions.json")]) == 0
    return folder


def test_files(made):
    samples = json.loads((made / "instruct.json").read_text())
    kinds = [sample["kind"] for sample in samples]
    assert kinds == list(KINDS) * 20 and len({sample["id"] for sample in samples}) == 60
    by_kind = [json.loads((made / f"{kind}.json").read_text()) for kind in KINDS]
    assert sorted((one for rows in by_kind for one in rows), key=lambda s: s["id"]) == sorted(
        samples, key=lambda s: s["id"]
    )
    for sample in samples[1::3]:
        assert sample["conversations"][0]["value"].replace("<image>", "").strip() in DETAIL_REQUESTS
    captions = json.loads((made / "captions.json").read_text())
    assert len(captions) == 60
    for sample in samples + captions:
        first, *later = (turn["value"] for turn in sample["conversations"])
        assert first.startswith("<image>\n") != first.endswith("\n<image>")  # equation 2: one or the other
        assert not any("<image>" in text for text in later)
        with Image.open(made / sample["image"]) as image:
            assert image.size == (144, 144)
    first = [sample["conversations"][0]["value"].startswith("<image>") for sample in samples + captions]
    assert 35 < sum(first) < 85
    assert captions[0]["conversations"][0]["value"].replace("<image>", "").strip() in CAPTION_REQUESTS


def test_training_reads_it(made):
    """Every sample loads, and all of every answer is learned, under each template of the paper."""
    tokenizer = Tokenizer.load(PARTS / "decoder")
    samples = load_samples([made / "instruct.json", made / "captions.json"])
    assert len(samples) == 120
    for sample in samples:
        for template in ("v0", "v1"):
            encoded = encode_conversation(sample["conversations"], tokenizer, template=template, num_images=1)
            learned = tokenizer.decode([label for label in encoded.labels if label >= 0])
            for turn in sample["conversations"][1::2]:
                assert turn["value"] in learned


def test_same_command_same_files(made, tmp_path):
    assert main(["--scenes", "60", "--rules", "--in-turn", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "instruct.json").read_bytes() == (made / "instruct.json").read_bytes()
    assert main(["--scenes", "60", "--rules", "--in-turn", "--seed", "5", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "instruct.json").read_bytes() != (made / "instruct.json").read_bytes()


def test_counts(tmp_path):
    counts = ["--count", "conversation=7", "detail=3"]
    assert main(["--scenes", "20", "--rules", *counts, "--out", str(tmp_path)]) == 0
    samples = json.loads((tmp_path / "summary.json").read_text())["samples"]
    assert samples == {"conversation": 7, "detail": 3, "reasoning": 20}
