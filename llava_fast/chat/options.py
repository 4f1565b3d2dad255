"""The options of ``python -m llava_fast.chat``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llava_fast.chat.reading import default_history
from llava_fast.engine import SamplingParams
from llava_fast.errors import ConfigError
from llava_fast.model.quantized import KINDS
from llava_fast.processor.conversation import find_template

EPILOG = """\
in the chat: /image, /reset, /retry, /save, /help, /quit; Ctrl-C stops an answer and not the program.
From a pipe each line is a question or a command, and the answers alone go to standard output:
  printf '%s\\n' '/image photo.jpg' 'What is this?' | python -m llava_fast.chat MODEL

exit code: 0; 1 when from a pipe something came to nothing, 2 when nothing could begin, 130 after Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.chat",
        description="Talk to a model in the terminal.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="LLaVA directory or hub id: transformers' format or the authors' (default: the built-in tiny model)",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH_OR_URL", help="for the first question; may be repeated"
    )
    parser.add_argument("--system", metavar="TEXT", help="in place of the template's system text")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=float, default=0.2, help="0 takes the likeliest token (default %(default)s)"
    )
    sampling.add_argument(
        "--top-p", type=float, default=0.7, help="draw from this share of probability (default %(default)s)"
    )
    sampling.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (default %(default)s)")
    sampling.add_argument("--seed", type=int, help="the same answers in every run (default: others each time)")
    machine = parser.add_argument_group("model and machine")
    machine.add_argument("--device", help="such as cuda:1 (default: the first CUDA device, else cpu)")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in (default bfloat16 on cuda, float32 on a cpu)",
    )
    machine.add_argument("--quantization", choices=KINDS, help="round the decoder's weights as they are read")
    machine.add_argument("--vision-tower", help="CLIP directory of an authors' checkpoint, if not where it says")
    machine.add_argument("--base", help="LLaMA directory that an authors' delta checkpoint is added to")
    terminal = parser.add_argument_group("terminal")
    terminal.add_argument("--quiet", action="store_true", help="no line of times after an answer")
    terminal.add_argument(
        "--history",
        metavar="FILE",
        default=str(default_history()),
        help="of what you typed; '' for none (default %(default)s)",
    )
    return parser


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """Raises InvalidRequestError: a value that cannot work."""
    return SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        ConfigError: it does not exist.
    """
    count = torch.cuda.device_count()
    if args.device is None:
        return torch.device("cuda:0" if count else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ConfigError(f"--device {args.device} is no device; give cpu or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {args.device}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"--device {args.device}: there is no such device, torch sees {count} CUDA devices")
    return device


def check_system(template: str) -> None:
    """Raises ConfigError where the template has no place for a system text."""
    if "{system}" not in find_template(template).first:
        raise ConfigError(f"--system: the model's template {template!r} has no place for a system text; leave it out")


def history_of(args: argparse.Namespace) -> Path | None:
    return Path(args.history).expanduser() if args.history else None
