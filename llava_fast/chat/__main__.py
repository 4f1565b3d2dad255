"""python -m llava_fast.chat: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from llava_fast.chat.options import build_parser, check_system, device_of, history_of, sampling_of
from llava_fast.chat.reading import INSTALL, Editor, Pipe, Plain, Reader
from llava_fast.chat.screen import Screen, open_screen
from llava_fast.chat.session import COMMANDS, Session
from llava_fast.engine import Engine, EngineConfig
from llava_fast.errors import LlavaError
from llava_fast.pretrained import built_in, load

FAILED, NOT_BEGUN, INTERRUPTED = 1, 2, 130
BUILT_IN = (
    "the built-in tiny model: it knows drawings of colored shapes only, such as `python -m llava_fast.data.scenes "
    'FOLDER --count 4` makes; ask "What color is the circle?"'
)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # half a character ends no chat
    screen = open_screen()
    try:
        return run(args, screen)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return FAILED
    except LlavaError as error:
        screen.error(str(error))
    except torch.OutOfMemoryError as error:
        screen.error(f"out of memory: {str(error).splitlines()[0]}; try --quantization int8")
    return NOT_BEGUN


def run(args: argparse.Namespace, screen: Screen) -> int:
    sampling = sampling_of(args)
    device = device_of(args)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    reader = open_reader(args, screen)
    name = str(args.model or "built-in model")
    screen.note(f"loading {name} onto {device}")
    model, processor = load(
        args.model or built_in(),
        device=device,
        dtype=getattr(torch, dtype),
        quantization=args.quantization,
        vision_tower=args.vision_tower,
        base=args.base,
    )
    if args.system is not None:
        check_system(processor.template)
    with Engine(model, processor, EngineConfig(max_sequences=2)) as engine:  # one, and what it shares with the last
        session = Session(engine, sampling, screen, reader, system=args.system, quiet=args.quiet)
        screen.title(f"{name} · {args.quantization or dtype} on {device}")
        if not args.model:
            screen.tell(BUILT_IN)
        screen.note("/image PATH adds a picture, /help tells the rest, Ctrl-D leaves")
        for picture in args.image:
            session.add_pictures(picture)
        session.run()
    return FAILED if session.failures and not screen.decorated else 0


def open_reader(args: argparse.Namespace, screen: Screen) -> Reader:
    if not screen.decorated:
        return Pipe()
    try:
        return Editor(history_of(args), (*COMMANDS, "/quit"))
    except ImportError:
        screen.note(INSTALL)
    except OSError as error:
        screen.note(
            f"no history: {error.filename} cannot be written ({error.strerror}); --history FILE chooses another"
        )
        return Editor(None, (*COMMANDS, "/quit"))
    return Plain()


if __name__ == "__main__":
    sys.exit(main())
