"""python -m llava_fast.evaluate recipes: the ablations of the paper as commands, with the figures that it reports."""

from __future__ import annotations

import argparse
import threading
from dataclasses import dataclass
from typing import Any

TRAIN, EVALUATE = "python -m llava_fast.train", "python -m llava_fast.evaluate"
CONVERT = "python -m llava_fast.data.scienceqa"
_PARTS = "--vision-tower clip-vit-large-patch14 --decoder {decoder}"
_SQA = "--problems problems.json --splits pid_splits.json --images images"


@dataclass(frozen=True)
class Recipe:
    """Attributes: figure: what the paper reports, in percent; commands: what leads to one of one's own."""

    name: str
    about: str
    figure: str
    commands: tuple[str, ...]


def _scienceqa(
    name: str, about: str, figure: str, *, output: str = "LEPA", decoder: str = "vicuna-13b", train: str = "",
    align: bool = True, style: str = "two-pass",
) -> Recipe:  # fmt: skip
    parts, out = _PARTS.format(decoder=decoder), f"runs/scienceqa-{name}"
    layer = " --select-layer -1" if "--select-layer -1" in train else ""
    first = f"{TRAIN} --recipe paper-stage1 {parts}{layer} --data chat.json --images cc3m --out {out}/stage1"
    start = f" --projector {out}/stage1/projector.safetensors" if align else ""
    return Recipe(
        name,
        about,
        figure,
        (
            f"{CONVERT} {_SQA} --split train --format QCM-{output} --out train_QCM-{output}.json",
            *((first,) if align else ()),
            f"{TRAIN} --recipe scienceqa {parts}{start} --data train_QCM-{output}.json --images images "
            f"--out {out}/stage2{train}",
            f"{EVALUATE} scienceqa {_SQA} --model {out}/stage2/model --style {style} --out {out}/test "
            f"--json {out}/scores.json",
        ),
    )


def _bench(name: str, about: str, figure: str, mixture: str | None) -> Recipe:
    parts, out = _PARTS.format(decoder="vicuna-13b"), f"runs/bench-{name}"
    judge = "--judge-url https://api.openai.com/v1 --judge-model gpt-4"
    first = f"{TRAIN} --recipe paper-stage1 {parts} --data chat.json --images cc3m --out runs/align"
    tuned = (
        f"{EVALUATE} mixture {mixture} --out {name}.json",
        f"{TRAIN} --recipe paper-stage2 {parts} --projector runs/align/projector.safetensors --data {name}.json "
        f"--images train2017 --out {out}",
    )
    joined = f"{EVALUATE} assemble {parts} --projector runs/align/projector.safetensors --template v0 --out {out}/model"
    score = (
        f"{EVALUATE} llava-bench --set coco --bench llava_bench_coco --images val2014 --model "
        f"{out}/model {judge} --out {out}/judged --json {out}/scores.json"
    )
    return Recipe(name, about, figure, (first, *(tuned if mixture else (joined,)), score))


_CONV, _DETAIL, _COMPLEX = "conversation_58k.json", "detail_23k.json", "complex_reasoning_77k.json"

RECIPES = (
    _scienceqa("best", "Table 8: features before the last layer, reasons first, 13B", "90.92"),
    _scienceqa("last-layer", "Table 8: features after the last layer", "89.96", train=" --select-layer -1"),
    _scienceqa("answer-first", "Table 8: the answer before its reasons", "89.77", output="ALE", style="reason-first"),
    _scienceqa("reason-first-6", "section 5.2: reasons first, half as long", "89.77", train=" --epochs 6"),
    _scienceqa("no-stage-1", "Table 8: trained from scratch, with no aligned projector", "85.81", align=False),
    _scienceqa("7b", "Table 8: the smaller decoder", "89.84", decoder="vicuna-7b"),
    _bench("full", "Table 4: all three kinds of data", "85.1", f"{_CONV} {_DETAIL} {_COMPLEX}"),
    _bench("detail-complex", "Table 4: without conversation", "81.9", f"{_DETAIL} {_COMPLEX}"),
    _bench("conv-some", "Table 4: a little of the others", "80.5", f"{_CONV} {_DETAIL}:0.05 {_COMPLEX}:0.10"),
    _bench("conv", "Table 4: conversation alone", "73.8", _CONV),
    _bench("untuned", "Table 4: stage 1 alone", "21.5", None),
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "recipes",
        help="the ablations of the paper as commands",
        description="Print the commands of an ablation of the paper (Tables 4 and 8), with the figure that the paper "
        "reports. Nothing is run. Names of files and folders are examples.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("name", nargs="?", choices=[recipe.name for recipe in RECIPES], help="default: list them")


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    if args.name is None:
        for recipe in RECIPES:
            print(f"{recipe.name:16}{recipe.figure:>7}  {recipe.about}")
        print("\nsecond column: what the paper reports, in percent; evaluate recipes NAME prints the commands")
        return 0
    recipe = next(recipe for recipe in RECIPES if recipe.name == args.name)
    print(f"# {recipe.about}. The paper reports {recipe.figure}.")
    print("\n".join(recipe.commands))
    return 0
