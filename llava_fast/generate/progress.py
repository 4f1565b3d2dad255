"""Progress: what this run has done, on the terminal and as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_fast.generate.answers import Answer
from llava_fast.generate.output import Output


class Progress:
    """Args:
    prompts: lines of the whole input that want an answer.
    output: where answers go; it counts those of all runs.
    devices: that this run works on.
    """

    def __init__(self, prompts: int, output: Output, devices: list[str]):
        self.prompts, self._output, self._devices = prompts, output, devices
        self.faults: list[str] = []  # what went wrong beyond single lines
        self._bar: tqdm | None = None
        self._requests = self._prompt_tokens = self._generated_tokens = 0
        self._start_seconds = self._seconds = 0.0
        self._since = time.perf_counter()

    @property
    def done(self) -> int:
        return self._output.answered + self._output.errors

    @property
    def left(self) -> int:
        return self.prompts - self.done

    @property
    def complete(self) -> bool:
        """Whether every line has an answer, not an error."""
        return self._output.answered == self.prompts

    def say(self, line: str) -> None:
        """A line on the terminal, above the bar."""
        tqdm.write(line, file=sys.stderr)

    def start(self) -> None:
        """The engines stand; the first line goes in."""
        self._start_seconds = time.perf_counter() - self._since
        self._since = time.perf_counter()
        self._bar = tqdm(total=self.prompts, initial=self.done, desc="generate", unit="request", dynamic_ncols=True)

    def count(self, answers: list[Answer]) -> None:
        self._requests += len(answers)
        self._prompt_tokens += sum(answer["prompt_tokens"] for answer in answers)
        self._generated_tokens += sum(answer["generated_tokens"] for answer in answers)
        self._seconds = time.perf_counter() - self._since
        if self._bar is not None and answers:
            rate = f"{self._generated_tokens / self._seconds:,.0f} tokens/s"
            errors = f", {self._output.errors} errors" if self._output.errors else ""
            self._bar.set_postfix_str(rate + errors, refresh=False)
            self._bar.update(len(answers))

    def fault(self, text: str) -> None:
        self.faults.append(text)
        self.say(f"error: {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self) -> str:
        """The counts in words."""
        seconds = self._seconds or 1.0  # nothing was done in none
        lines = [
            f"{self._requests} lines in {self._seconds:.1f} s: {self._requests / seconds:.1f} requests/s, "
            f"{self._generated_tokens / seconds:,.0f} tokens/s; {self._output.path}: {self._output.answered} of "
            f"{self.prompts} answered, {self._output.errors} errors, {self.left} left"
        ]
        if self.left:
            lines.append("start the same command again to go on")
        if self._output.errors:
            lines.append('lines that failed have "error"; --retry-errors does them again')
        return "\n".join(lines)

    def write_summary(self, path: Path) -> None:
        """Counts of the whole output and what this run took, as JSON."""
        seconds = self._seconds or 1.0
        summary: dict[str, Any] = {
            "lines": self.prompts,
            "answered": self._output.answered,
            "errors": self._output.errors,
            "left": self.left,
            "this_run": {
                "devices": self._devices,
                "requests": self._requests,
                "prompt_tokens": self._prompt_tokens,
                "generated_tokens": self._generated_tokens,
                "start_seconds": self._start_seconds,
                "seconds": self._seconds,
                "requests_per_s": self._requests / seconds,
                "tokens_per_s": self._generated_tokens / seconds,
                "faults": self.faults,
            },
        }
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
