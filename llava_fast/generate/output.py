"""Output: the file of answers, one line an answer, in the order in which they were finished.

Lines are only ever appended, and are tied to input, model and settings; see :mod:`llava_fast.appended`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_fast.appended import cut_half_line, open_locked, tie_to_run
from llava_fast.errors import ConfigError
from llava_fast.generate.answers import Answer, to_json

_ANOTHER = "choose another --output"
_CURE = f"{_ANOTHER}, or add --overwrite to delete what it holds"


class Output:
    """The one writer of a file of answers; a second one is refused while this one is open.

    Args:
        path: made when it does not exist, with its folder.
        run: what the answers depend on, as JSON holds it.
        lines: of the input.
        overwrite: delete what the file holds.
        retry: delete the errors that it holds, so that their lines are done again.

    Attributes:
        answered: lines with an answer; errors: lines with an error. Both over all runs.

    Raises:
        ConfigError: the file is of another run or of another program, damaged, in use, or cannot be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], lines: int, *, overwrite: bool = False, retry: bool = False):
        self.path = path
        self.answered = self.errors = 0
        self._done = bytearray(lines + 1)  # by number of the line
        try:
            self._file = open_locked(path, _ANOTHER)
            if overwrite:
                self._file.truncate(0)
            if tie_to_run(path, run, _CURE):
                self._take_up(retry)
        except OSError as error:
            raise ConfigError(f"--output {path}: {error.strerror}; choose one that can be written") from error

    def is_done(self, number: int) -> bool:
        """Whether line ``number`` has an answer or an error."""
        return bool(self._done[number])

    def write(self, answers: list[Answer]) -> None:
        """Append answers and hand them to the operating system. Raises OSError, on a full disk for instance."""
        self._file.write(b"".join(map(to_json, answers)))
        self._file.flush()
        for answer in answers:
            self._count(answer)

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said when it was written
            self._file.close()

    def _count(self, answer: Answer) -> None:
        self._done[answer["line"]] = 1
        self.errors += answer["error"] is not None
        self.answered += answer["error"] is None

    def _take_up(self, retry: bool) -> None:
        cut_half_line(self._file)
        if retry:
            self._drop_errors()
        for answer in self._answers():
            self._count(answer)

    def _answers(self) -> Iterator[Answer]:
        self._file.seek(0)
        for number, raw in enumerate(self._file, 1):
            try:
                answer = json.loads(raw)
                known = 0 < answer["line"] < len(self._done) and "error" in answer
            except (ValueError, TypeError, KeyError):
                known = False
            if not known:
                raise ConfigError(
                    f"line {number} of {self.path} is no answer to this input: {raw[:60]!r}; delete that line to have "
                    f"its prompt answered again, or {_CURE}"
                )
            yield answer

    def _drop_errors(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        kept = open_locked(part, _ANOTHER)  # locked before it takes the name
        kept.truncate(0)
        for answer in self._answers():
            if answer["error"] is None:
                kept.write(to_json(answer))
        kept.flush()
        os.fsync(kept.fileno())
        part.replace(self.path)
        self._file.close()
        self._file = kept
