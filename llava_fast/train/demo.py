"""The built-in demonstration: both stages on built-in pictures, then what the model sees of pictures it never saw."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llava_fast.checkpoint import join
from llava_fast.checkpoint.files import write_json
from llava_fast.data.scenes import QUESTIONS, Quiz, Scenes, held_out
from llava_fast.model import Llava
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.recipe import recipe
from llava_fast.train.trainer import Trainer

PARTS = Path(__file__).parent / "tiny"  # what CLIP and Vicuna are to LLaVA; made by llava_fast.train.tiny
TRAIN_SEED, EVAL_SEED = 1, 4051
CAPTIONS, INSTRUCTIONS, QUIZZES = 3072, 10_240, 600


def run(
    out: Path, *, device: torch.device, dtype: torch.dtype, seed: int = 0, workers: int | None = None
) -> dict[str, Any]:
    """Train both stages under ``out``, measure, write summary.json and answers.png, and return the summary.

    The summary's ``accuracy`` is the share of held-out questions answered word for word with the right picture,
    ``accuracy_swapped`` the same with every picture replaced by another question's, and ``accuracy_guessing`` what the
    best constant answer to each question would reach.
    """
    started = time.perf_counter()
    tokenizer = Tokenizer.load(PARTS / "decoder")
    model = join(PARTS / "vision", PARTS / "decoder", device=device, dtype=dtype, seed=seed)
    model.config = model.config.replace(template="v1")

    processor = Processor.from_config(model.config, tokenizer)
    align = recipe("tiny-stage1", seed=seed, workers=workers)
    first = Trainer(model, processor, align, Scenes(CAPTIONS, TRAIN_SEED, ("caption",)), out / "stage1").run()
    aligned = measure_accuracy(model, processor, held_out(QUIZZES, EVAL_SEED))
    instruct = recipe("tiny-stage2", seed=seed, workers=workers)
    second = Trainer(
        model,
        processor,
        instruct,
        Scenes(INSTRUCTIONS, TRAIN_SEED),
        out / "stage2",
        eval_samples=Scenes(192, EVAL_SEED),
    ).run()
    result = measure_accuracy(model, processor, held_out(QUIZZES, EVAL_SEED))
    draw_answers(result, out / "answers.png")
    summary = {
        "accuracy": result["accuracy"],
        "accuracy_swapped": result["accuracy_swapped"],
        "accuracy_guessing": result["accuracy_guessing"],
        "accuracy_by_kind": result["by_kind"],
        "accuracy_after_stage1": aligned["accuracy"],
        "questions": QUIZZES,
        "seconds": time.perf_counter() - started,
        "tokens_per_s": (first["tokens"] + second["tokens"]) / (first["seconds"] + second["seconds"]),
        "model": str(out / "stage2" / "model"),
        "stage1": first,
        "stage2": second,
    }
    write_json(out / "summary.json", summary)
    print_result(summary, out)
    return summary


def measure_accuracy(model: Llava, processor: Processor, quizzes: list[Quiz]) -> dict[str, Any]:
    """Greedy answers to every question with its own picture and with the next question's, compared word for word."""
    own = answer(model, processor, quizzes, [q.image for q in quizzes])
    # The questions' kinds come in turn, so a shift by the number of kinds swaps pictures under equal kinds too.
    shift = len(QUESTIONS)
    swapped = answer(
        model, processor, quizzes, [quizzes[(i + shift) % len(quizzes)].image for i in range(len(quizzes))]
    )
    right = defaultdict(list)
    for quiz, said in zip(quizzes, own, strict=True):
        right[quiz.kind].append(said == quiz.answer)
    return {
        "accuracy": sum(said == q.answer for said, q in zip(own, quizzes, strict=True)) / len(quizzes),
        "accuracy_swapped": sum(said == q.answer for said, q in zip(swapped, quizzes, strict=True)) / len(quizzes),
        "accuracy_guessing": guessing(quizzes),
        "by_kind": {kind: sum(hits) / len(hits) for kind, hits in right.items()},
        "answers": list(zip(quizzes, own, strict=True)),
    }


def guessing(quizzes: list[Quiz]) -> float:
    """Accuracy of someone who knows the questions and how often each answer is right, and sees nothing.

    Counted over a large set of other questions: for every question text its most frequent answer there.
    """
    best = most_frequent_answers()
    return sum(best.get(q.question) == q.answer for q in quizzes) / len(quizzes)


@cache
def most_frequent_answers() -> dict[str, str]:
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for quiz in held_out(20_000, EVAL_SEED + 1):
        seen[quiz.question][quiz.answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in seen.items()}


def answer(model: Llava, processor: Processor, quizzes: list[Quiz], images: list[Any], at_once: int = 100) -> list[str]:
    replies: list[str] = []
    for i in range(0, len(quizzes), at_once):
        prompts = [
            processor.prompt(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": image}, {"type": "text", "text": quiz.question}],
                    }
                ]
            )
            for quiz, image in zip(quizzes[i : i + at_once], images[i : i + at_once], strict=True)
        ]
        batch = processor.collate(prompts).to(model.device, model.dtype)
        replies += [processor.decode(ids).strip() for ids in model.generate(batch, max_new_tokens=24)]
    return replies


def draw_answers(result: dict[str, Any], path: Path, rows: int = 4, columns: int = 6) -> None:
    """A sheet of held-out pictures with question and answer; a wrong answer is red, the right one below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=(2.9 * columns, 3.0 * rows), dpi=90)
    for axes, (quiz, said) in zip(grid.flat, result["answers"], strict=False):
        axes.imshow(quiz.image)
        axes.set_xticks([])
        axes.set_yticks([])
        good = said == quiz.answer
        axes.set_title(quiz.question, fontsize=9, wrap=True)
        axes.set_xlabel(
            said if good else f"{said}\n(right: {quiz.answer})",
            fontsize=9,
            color="#1b6e2f" if good else "#b3261e",
            wrap=True,
        )
    figure.suptitle(
        f"Held-out pictures: {result['accuracy']:.1%} of {len(result['answers'])} questions right, "
        f"{result['accuracy_swapped']:.1%} when the pictures are swapped",
        fontsize=13,
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def print_result(summary: dict[str, Any], out: Path) -> None:
    kinds = "  ".join(f"{kind} {share:.0%}" for kind, share in summary["accuracy_by_kind"].items())
    print(
        f"\nheld-out accuracy on {summary['questions']} questions about new pictures\n"
        f"  with the right picture   {summary['accuracy']:.1%}   ({kinds})\n"
        f"  with swapped pictures    {summary['accuracy_swapped']:.1%}\n"
        f"  guessing without seeing  {summary['accuracy_guessing']:.1%}\n"
        f"  after stage 1 alone      {summary['accuracy_after_stage1']:.1%}\n"
        f"{summary['seconds']:.0f} s; pictures and answers in {out / 'answers.png'}, model in {summary['model']}"
    )
