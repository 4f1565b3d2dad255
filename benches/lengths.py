"""Real sample lengths, counted with the LLaMA-2 tokenizer under the v1 template; no text comes with them.

    python -m benches.lengths DATA     # counts anew; in DATA: llava_pretrain/ scienceqa/ llava_bench_coco/ tokenizer/

A row is (tokens of the prompt without image rows, supervised tokens, images). The sources are the caption pairs of
LCS-558K that are at hand, the ScienceQA problems that have a lecture or a solution (question first, reason before the
answer: QCM-LEPA), and GPT-4's conversations, descriptions and reasonings about COCO pictures, one turn each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
Row = tuple[int, int, int]


def source(name: str) -> list[Row]:
    """All rows of "captions", "scienceqa" or "conversations"."""
    return [(prompt, supervised, images) for prompt, supervised, images in json.loads(FILE.read_text())[name]]


def of_stage(stage: int, count: int, seed: int = 0) -> list[Row]:
    """``count`` rows as the stage meets them: captions; or ScienceQA and conversations, in the numbers they have.

    Every row comes once before any comes twice.
    """
    rows = source("captions") if stage == 1 else source("scienceqa") + source("conversations")
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(rows)) for _ in range(-(-count // len(rows)))])
    return [rows[i] for i in order[:count]]


def sizes(rows: list[Row], tokens_per_image: int) -> np.ndarray:
    """(n, 3) int64: tokens with image rows, supervised tokens, images."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return np.stack([table[:, 0] + table[:, 1] + table[:, 2] * tokens_per_image, table[:, 1], table[:, 2]], axis=1)


def count(data: Path) -> dict[str, list[Row]]:
    from llava_fast.config import ModelConfig
    from llava_fast.data.scienceqa import build_sample
    from llava_fast.processor import Processor, Tokenizer

    config = ModelConfig.preset("llava-1.5-7b")
    processor = Processor.from_config(config, Tokenizer.load(data / "tokenizer" / "llama2_tokenizer.model"))

    def row(sample: dict) -> Row:
        encoded = processor.encode(sample)
        supervised, images = int((encoded.labels >= 0).sum()), len(encoded.images)
        return len(encoded.input_ids) - images * config.tokens_per_image - supervised, supervised, images

    def turn(line: str) -> dict:
        found = json.loads(line)
        asked = {"from": "human", "value": f"{found['instruction']}\n<image>"}
        return {"image": "x", "conversations": [asked, {"from": "gpt", "value": found["output"]}]}

    problems = json.loads((data / "scienceqa" / "problems.json").read_text())
    lines = (data / "llava_bench_coco" / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()
    return {
        "captions": [row(s) for s in json.loads((data / "llava_pretrain" / "chat.json").read_text())],
        "scienceqa": [
            row(build_sample(pid, p, "QCM-LEPA")) for pid, p in problems.items() if p["lecture"] or p["solution"]
        ],
        "conversations": [row(turn(line)) for line in lines],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the lengths anew.")
    parser.add_argument("data", type=Path)
    found = count(parser.parse_args().data)
    FILE.write_text("{\n" + ",\n".join(f'"{name}": {json.dumps(rows)}' for name, rows in found.items()) + "\n}\n")
    for name, rows in found.items():
        print(f"{name}: {len(rows)} rows, mean {np.mean(rows, axis=0).round(1).tolist()}")
