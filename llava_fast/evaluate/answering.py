"""Answers from a model: questions go through the engine of ``python -m llava_fast.generate``, on every card."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llava_fast.checkpoint import config_of
from llava_fast.engine import Request, SamplingParams
from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import Row, read_rows, write_whole
from llava_fast.generate.__main__ import answer, open_pool
from llava_fast.generate.options import build_parser, devices_of, setup_of
from llava_fast.generate.output import Output
from llava_fast.generate.progress import Progress
from llava_fast.generate.prompts import read, survey
from llava_fast.generate.setup import Setup, checkpoint_digest
from llava_fast.interrupt import Interrupted
from llava_fast.processor import Processor, Tokenizer

_OPTIONS = {  # of generate, that are worth a place here
    "devices": ("LIST", "such as cuda:0,cuda:1, a process for each (default: every CUDA device, else cpu)"),
    "dtype": ("TYPE", "float32, bfloat16 or float16 (default bfloat16 on cuda, float32 on a cpu)"),
    "quantization": ("KIND", "int8, int4 or fp8: round the decoder's weights as they are read"),
    "vision_tower": ("DIR", "CLIP directory of an authors' checkpoint, if not where it says"),
    "base": ("DIR", "LLaMA directory that an authors' delta checkpoint is added to"),
    "max_sequences": ("N", "answers that are worked on at a time"),
    "kv_cache_bytes": ("N", "bytes for keys and values; by default a share of the free memory"),
}


@dataclass(frozen=True, kw_only=True)
class TokenSetup(Setup):
    """A Setup whose rows may have ``token_ids``, a prompt that is tokenized already, with ``image`` for its picture."""

    def request(self, row: Mapping[str, Any], number: int) -> Request:
        if "token_ids" not in row:
            return super().request(row, number)
        images = [] if row.get("image") is None else [(self.image_dir or Path()) / row["image"]]
        sampling = SamplingParams(**{**self.sampling, **row.get("sampling", {})})
        return Request(token_ids=row["token_ids"], images=images, sampling=sampling)


@dataclass
class Answers:
    """Attributes: texts: by id of the row, stripped; failures: why there is none, by id."""

    texts: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def add_model_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The options of a model that answers."""
    group = parser.add_argument_group("model that answers")
    group.add_argument("--model", metavar="DIR", help="LLaVA directory or hub id: transformers' format or the authors'")
    group.add_argument("--images", type=Path, metavar="DIR", help="folder that the images' names are relative to")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", default=max_tokens, help="of an answer (default %(default)s)"
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="0 takes the likeliest token (default)"
    )
    for name, (metavar, text) in _OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), metavar=metavar, help=text)


def setup_from(args: argparse.Namespace) -> tuple[TokenSetup, list[str]]:
    """What the options come to, and the devices.

    Raises:
        ConfigError, InvalidRequestError, CheckpointError: a value that cannot work, or no such model.
    """
    argv = [args.model, "--input", "-", "--max-tokens", str(args.max_tokens), "--temperature", str(args.temperature)]
    argv += ["--seed", str(args.seed), "--image-dir", str(args.images or ".")]
    for name in _OPTIONS:
        value = getattr(args, name)
        argv += [] if value is None else ["--" + name.replace("_", "-"), str(value)]
    parsed = build_parser().parse_args(argv)
    devices = devices_of(parsed)
    setup = setup_of(parsed, devices)
    return TokenSetup(**{name: getattr(setup, name) for name in setup.__dataclass_fields__}), devices


def subject_of(setup: Setup) -> dict[str, Any]:
    """What a result says about the model."""
    return {
        "model": setup.model,
        "checkpoint": checkpoint_digest(Path(setup.model)),
        "dtype": setup.dtype,
        "quantization": setup.quantization,
    }


def processor_of(setup: Setup) -> Processor:
    """The model's processor, with no weights read.

    Raises:
        CheckpointError, TokenizerError: the directory has no config or no tokenizer that can be read.
    """
    directory = Path(setup.model)
    own = any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = Tokenizer.load(directory if own or setup.base is None else Path(setup.base))
    return Processor.from_config(config_of(directory, vision_tower=setup.vision_tower), tokenizer)


def answer_rows(
    rows: Sequence[Row],
    path: Path,
    setup: TokenSetup,
    devices: list[str],
    stop: threading.Event,
    *,
    overwrite: bool = False,
) -> Answers:
    """Answer every row that ``path`` has no answer to yet.

    Args:
        rows: as :mod:`llava_fast.generate.requests` says, or with ``token_ids``; each with an ``id`` of its own.
        path: JSONL file of answers; the rows are written beside it.
        setup: the model and how it answers.
        devices: where it runs.
        stop: when set, the run ends with what is answered.
        overwrite: delete earlier answers.

    Raises:
        Interrupted: ``stop`` was set.
        ConfigError: the path holds answers of another run; or a device was lost and left rows unanswered.
    """
    asked = path.with_suffix(".questions.jsonl")
    write_whole(asked, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = survey(asked)
    depends = {
        "questions": found.digest,
        "seed": setup.seed,
        "sampling": dict(setup.sampling),
        "max_length": setup.engine.max_length,
        **subject_of(setup),
    }
    depends.pop("model")  # the checkpoint may have moved
    output = Output(path, depends, found.lines, overwrite=overwrite, retry=True)
    progress = Progress(found.prompts, output, devices)
    try:
        if progress.left:
            progress.say(f"loading {setup.model} onto {', '.join(devices)}")
            answer(read(asked, output.is_done), open_pool(setup, devices, stop), output, progress, stop)
            progress.say(progress.report().splitlines()[0])
    finally:
        output.close()
    if stop.is_set():
        raise Interrupted(f"stopped; {path} holds {output.answered} of {len(rows)} answers")
    if progress.left:
        raise ConfigError(f"{progress.left} of {len(rows)} questions have no answer: {'; '.join(progress.faults)}")
    return _read_answers(path)


def _read_answers(path: Path) -> Answers:
    answers = Answers()
    for row in read_rows(path):
        if row["error"] is None:
            answers.texts[str(row["id"])] = row["text"].strip()
        else:
            answers.failures[str(row["id"])] = f"{row['error']['type']}: {row['error']['message']}"
    return answers


def with_sampling(setup: TokenSetup, **changes: Any) -> TokenSetup:
    """The same model with other fields of SamplingParams."""
    return replace(setup, sampling={**setup.sampling, **changes})


def digest_of_texts(texts: Mapping[str, str]) -> str:
    """Tells sets of answers apart, whatever their order."""
    return blake2b(json.dumps(sorted(texts.items())).encode(), digest_size=16).hexdigest()
