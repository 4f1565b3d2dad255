"""The options of ``python -m llava_fast.generate``, and what they come to."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch

from llava_fast.engine import EngineConfig, SamplingParams
from llava_fast.engine.config import ACTIVATION_BITS, CACHE_DTYPES
from llava_fast.errors import ConfigError
from llava_fast.generate.setup import Setup, default_dtype
from llava_fast.model.quantized import KINDS
from llava_fast.pretrained import find_checkpoint

EPILOG = """\
input, one JSON object a line:
  {"id": "a", "image": "photo.jpg", "prompt": "What is this?"}
  {"image": ["1.jpg", "2.jpg"], "prompt": "Compare.", "sampling": {"temperature": 0.7, "max_tokens": 64}}
  {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"},
                                                        {"type": "text", "text": "What is this?"}]}]}
  {"question_id": 1, "image": "001.jpg", "text": "What is this?"}       LLaVA-Bench's questions
Images stand before the prompt's text; "<image>" in a text is text. Other fields are not looked at.

output, one line an answer in the order in which they are finished:
  {"line": 1, "id": "a", "text": "A cat.", "finish_reason": "stop", "generated_tokens": 4, "prompt_tokens": 621,
   "error": null}
"line" is the line of the input, the same in every run, by which lines of equal id are told apart; a line without an id
has it as its id. A line that cannot be answered has "error": {"type", "message"} and stops nothing. Where "n" asks for
several answers, all are in "outputs".

The same command again goes on where a run stopped: only lines without an answer or an error are done. The output is
tied to input, model and settings by OUTPUT.run.json; budgets and devices may change.

exit code: 0 when every line has an answer, 1 when some have not, 2 when nothing could begin, 130 after Ctrl-C
"""

# What a line's "sampling" may override, and the budgets: named here because --help has to say what they are.
SAMPLING = {
    "max_tokens": "most tokens of an answer",
    "min_tokens": "fewest tokens of an answer",
    "temperature": "0 takes the likeliest token",
    "top_k": "draw from this many likeliest tokens; 0 for all",
    "top_p": "draw from the likeliest tokens of this total probability",
    "min_p": "leave out tokens less likely than this share of the likeliest",
    "repetition_penalty": "divides the logits of tokens seen before",
    "presence_penalty": "subtracted from the logits of tokens in the answer",
    "frequency_penalty": "the same, for each time they occur",
    "n": "answers to each line",
    "ignore_eos": "go on after the end of text",
    "logprobs": "write the log-probabilities of tokens, with this many alternatives",
}
BUDGETS = {
    "kv_cache_bytes": "bytes for keys and values; by default a share of the free memory",
    "memory_fraction": "that share; by default 0.9 on CUDA and 0.25 on a CPU",
    "kv_cache_dtype": "auto, or fp8 for half the bytes",
    "activation_bits": "of tokens before int8 and int4 weights on a CPU; by default 8 in bfloat16, else 16",
    "max_sequences": "answers that are worked on at a time",
    "max_step_tokens": "tokens computed in a step",
    "max_length": "tokens of prompt and answer together; by default the model's context",
    "max_images": "images of a line",
    "prefix_caching": "share equal beginnings of prompts",
    "feature_cache_bytes": "for the features of images seen before",
    "image_batch": "images that go through the vision tower at a time",
    "image_workers": "threads that read images; by default up to four",
    "cuda_graphs": "capture decode steps",
    "warmup": "run every shape before the first line",
}
_CHOICES: dict[str, tuple[Any, ...]] = {"kv_cache_dtype": CACHE_DTYPES, "activation_bits": ACTIVATION_BITS}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.generate",
        description="Answer a file of prompts: JSONL in, JSONL out, resumable, on every card of the machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="LLaVA directory or hub id: transformers' format or the authors'"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--input", type=Path, required=True, help="JSONL file of prompts")
    files.add_argument("--output", type=Path, help="JSONL file of answers (default: INPUT with .answers.jsonl)")
    files.add_argument("--image-dir", type=Path, help="what image paths are relative to (default: the input's folder)")
    files.add_argument("--overwrite", action="store_true", help="delete what --output holds and start over")
    files.add_argument("--retry-errors", action="store_true", help="do the lines again that ended in an error")
    files.add_argument("--json", type=Path, metavar="PATH", help="write counts, seconds and rates there")
    machine = parser.add_argument_group("model and machine")
    machine.add_argument(
        "--devices",
        "--device",
        metavar="LIST",
        help="such as cuda:0,cuda:1, a process for each (default: every CUDA device, else cpu)",
    )
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in (default bfloat16 on cuda, float32 on a cpu)",
    )
    machine.add_argument("--quantization", choices=KINDS, help="round the decoder's weights as they are read")
    machine.add_argument("--vision-tower", help="CLIP directory of an authors' checkpoint, if not where it says")
    machine.add_argument("--base", help="LLaMA directory that an authors' delta checkpoint is added to")
    sampling = parser.add_argument_group("sampling", 'of every line whose own "sampling" does not say otherwise')
    add_fields(sampling, SamplingParams, SAMPLING)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; may be given several times")
    sampling.add_argument(
        "--seed", type=int, default=0, help="draws follow from it and the line's number (default %(default)s)"
    )
    add_fields(parser.add_argument_group("engine", "budgets of each process"), EngineConfig, BUDGETS)
    return parser


def add_fields(group: Any, of: type, helps: dict[str, str]) -> None:
    """One option a field of a dataclass; None means that it was not given."""
    types = typing.get_type_hints(of)
    defaults = {field.name: field.default for field in dataclasses.fields(of)}
    for name, text in helps.items():
        flag = "--" + name.replace("_", "-")
        told = text if defaults[name] is None else f"{text} (default {defaults[name]})"
        if types[name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=told)
            continue
        kind = next(t for t in (*typing.get_args(types[name]), types[name]) if t is not type(None))
        metavar = None if name in _CHOICES else kind.__name__.upper()
        group.add_argument(flag, type=kind, choices=_CHOICES.get(name), metavar=metavar, default=None, help=told)


def devices_of(args: argparse.Namespace) -> list[str]:
    """The devices asked for, or all there are.

    Raises:
        ConfigError: one of them does not exist.
    """
    count = torch.cuda.device_count()
    if args.devices is None:
        return [f"cuda:{n}" for n in range(count)] or ["cpu"]
    devices = [name.strip() for name in args.devices.split(",")]
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"--devices {args.devices}: {name!r} is no device; give cpu or cuda:0,cuda:1") from None
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ConfigError(f"--devices {args.devices}: there is no {name}, torch sees {count} CUDA devices")
    return devices


def setup_of(args: argparse.Namespace, devices: list[str]) -> Setup:
    """What the options come to.

    Raises:
        ConfigError, InvalidRequestError: a value that cannot work.
        CheckpointError: no such model.
    """
    given = {name: getattr(args, name) for name in BUDGETS if getattr(args, name) is not None}
    queue = 2 * given.get("max_sequences", EngineConfig.max_sequences)
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.stop:
        sampling["stop"] = args.stop
    SamplingParams(**sampling)  # refused here, and not a million times
    return Setup(
        engine=EngineConfig(max_queue=max(1, queue), **given),
        sampling=sampling,
        model=str(find_checkpoint(args.model)),
        vision_tower=args.vision_tower,
        base=args.base,
        dtype=args.dtype or default_dtype(devices[0]),
        quantization=args.quantization,
        seed=args.seed,
        image_dir=(args.image_dir or args.input.parent).absolute(),
    )
