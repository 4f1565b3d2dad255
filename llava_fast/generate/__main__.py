"""python -m llava_fast.generate: answer a file of prompts."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llava_fast.errors import ConfigError, EngineClosedError, LlavaError
from llava_fast.generate.batches import Pool, batches
from llava_fast.generate.cards import Cards
from llava_fast.generate.in_flight import InFlight
from llava_fast.generate.options import build_parser, devices_of, setup_of
from llava_fast.generate.output import Output
from llava_fast.generate.progress import Progress
from llava_fast.generate.prompts import Line, Survey, read, survey
from llava_fast.generate.setup import Setup, checkpoint_digest
from llava_fast.interrupt import interrupts

UNANSWERED, NOT_BEGUN, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    stop = threading.Event()
    try:
        with interrupts(stop):
            return run(args, stop)
    except KeyboardInterrupt:
        print("\nstopped at once; what was written stands. Start the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except LlavaError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return NOT_BEGUN
    except torch.OutOfMemoryError as error:
        print(
            f"\nerror: out of memory: {str(error).splitlines()[0]}\n"
            "lower --kv-cache-bytes or --memory-fraction, or add --quantization int8",
            file=sys.stderr,
        )
        return NOT_BEGUN


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    devices = devices_of(args)
    setup = setup_of(args, devices)
    path = args.output or args.input.with_suffix(".answers.jsonl")
    found = survey(args.input)
    if path.exists() and path.samefile(args.input):
        raise ConfigError(f"--output {path} is the input; choose another")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no folder {args.json.absolute().parent}; make it first")
    same = what_answers_depend_on(args, setup, found)
    output = Output(path, same, found.lines, overwrite=args.overwrite, retry=args.retry_errors)
    progress = Progress(found.prompts, output, devices)
    try:
        if progress.left:
            progress.say(f"loading {setup.model} onto {', '.join(devices)}")
            pool = open_pool(setup, devices, stop)
            answer(read(args.input, output.is_done), pool, output, progress, stop)
    finally:
        output.close()
        if args.json:
            progress.write_summary(args.json)
    print(progress.report())
    if stop.is_set():
        return INTERRUPTED
    return 0 if progress.complete else UNANSWERED


def what_answers_depend_on(args: argparse.Namespace, setup: Setup, found: Survey) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with."""
    return {
        "input": found.digest,
        "image_dir": os.path.relpath(setup.image_dir or ".", args.input.parent.absolute()),
        "model": checkpoint_digest(Path(setup.model)),
        "vision_tower": setup.vision_tower,
        "base": setup.base,
        "dtype": setup.dtype,
        "quantization": setup.quantization,
        "kv_cache_dtype": setup.engine.kv_cache_dtype,
        "activation_bits": setup.engine.activation_bits,
        "max_length": setup.engine.max_length,
        "sampling": dict(setup.sampling),
        "seed": setup.seed,
    }


def open_pool(setup: Setup, devices: list[str], stop: threading.Event) -> Pool:
    """An engine in this process for one device, a process for each of several."""
    return Cards(setup, devices, stop) if len(devices) > 1 else InFlight(setup, setup.open(devices[0]))


def answer(lines: Iterable[Line], pool: Pool, output: Output, progress: Progress, stop: threading.Event) -> None:
    """Answer lines until none is left, ``stop`` is set, or what answers them has failed."""
    progress.start()
    try:
        for answers in batches(lines, pool):
            output.write(answers)
            progress.count(answers)
            while pool.faults:
                progress.fault(pool.faults.pop(0))
            if stop.is_set():
                break
    except (EngineClosedError, OSError) as error:  # a lost card, a full disk
        for fault in (*pool.faults, f"{type(error).__name__}: {error}"):
            progress.fault(fault)
    finally:
        progress.close()
        pool.close()


if __name__ == "__main__":
    sys.exit(main())
