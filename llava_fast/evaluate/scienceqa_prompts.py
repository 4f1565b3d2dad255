"""How ScienceQA is put to a model: reason first, two passes, or zero-shot.

- ``reason-first``: the question in the form QCM, one answer that ends in "The answer is X." Models that learned
  QCM-LEA, or QCM-ALE for the answer-first ablation.
- ``two-pass``: the paper's run. The model, which learned QCM-LEPA, writes its reasons; then these and " ###\\nANSWER:"
  are put into its mouth and it names the letter.
- ``zero-shot``: for models that never saw ScienceQA: the letter alone, in the words that LLaVA-1.5 learned for
  multiple-choice questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_fast.config import IMAGE_SENTINEL
from llava_fast.data.scienceqa import LETTERS, Problem, build_question, image_path
from llava_fast.evaluate.files import Row
from llava_fast.processor import Processor
from llava_fast.processor.conversation import Round, Text, encode_pieces, find_template, render

STYLES = ("reason-first", "two-pass", "zero-shot")
PROMPTER = " ###\nANSWER:"  # llava/eval/model_vqa_science.py with --answer-prompter
VERDICT = "\n The answer is "  # what it joins reasons and letter with
_ZERO_SHOT = "Answer with the option's letter from the given choices directly."  # in LLaVA-1.5's training data


def question_of(problem: Problem, style: str) -> str:
    """The text of the question."""
    if style != "zero-shot":
        return build_question(problem, "QCM")
    hint = [f"Context: {problem['hint'].strip()}"] if problem["hint"].strip() else []
    choices = [f"{x}. {c}" for x, c in zip(LETTERS, problem["choices"], strict=False)]
    return "\n".join([*hint, problem["question"], *choices, _ZERO_SHOT])


def first_row(pid: str, problem: Problem, style: str, *, image_last: bool) -> Row:
    """The question as a row for the engine; the picture's name is relative to the folder of images."""
    text: list[Row] = [{"type": "text", "text": question_of(problem, style)}]
    picture = image_path(pid, problem)
    image: list[Row] = [] if picture is None else [{"type": "image", "image": picture}]
    content = text + image if image_last else image + text
    return {"id": pid, "messages": [{"role": "user", "content": content}]}


def second_row(pid: str, problem: Problem, reasons: str, processor: Processor, *, image_last: bool) -> Row:
    """The same question with its reasons and the prompter put into the model's mouth."""
    picture = image_path(pid, problem)
    text = question_of(problem, "two-pass")
    around = [text] if picture is None else [text + "\n", ""] if image_last else ["", "\n" + text]
    form = find_template(processor.template)
    opened = render(form, [Round(around, None)], processor.tokenizer)
    ids = encode_pieces([*opened, Text(form.lead + reasons + PROMPTER)], processor.tokenizer).input_ids
    row = {"id": pid, "token_ids": [processor.image_token_id if i == IMAGE_SENTINEL else i for i in ids]}
    return row if picture is None else {**row, "image": picture}


def joined(reasons: str, letter: str) -> str:
    """Both passes as one text, as the authors keep it; a bare letter gets the dot that the parser looks for."""
    letter = letter.strip()
    return reasons + VERDICT + (letter + "." if len(letter) == 1 else letter)


def examples(problems: Mapping[str, Problem], count: int) -> list[tuple[str, str]]:
    """The first ``count`` text-only problems of the training split that have a solution, with their worked answers."""
    from llava_fast.data.scienceqa import build_answer

    fitting = [
        problem
        for problem in problems.values()
        if problem["split"] == "train" and problem["image"] is None and problem["solution"].strip()
    ]
    return [(build_question(problem, "QCM"), build_answer(problem, "LEA")) for problem in fitting[:count]]


def rows_of(problems: Mapping[str, Any], style: str, *, image_last: bool) -> list[Row]:
    return [first_row(pid, problem, style, image_last=image_last) for pid, problem in problems.items()]
