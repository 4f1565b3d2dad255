"""Output: the file of answers, one line an answer, in the order in which they were finished.

Lines are only ever appended, so whatever stops the run, what was written stands; a line that a kill left half-written
is cut off at the next start. Beside ``answers.jsonl`` lies ``answers.jsonl.run.json``: what the answers depend on
(input, model, settings). A run in which any of that is different does not go on with the file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from llava_fast.errors import ConfigError
from llava_fast.generate.answers import Answer, to_json

_FORMAT = 1
_CURE = "choose another --output, or add --overwrite to delete what it holds"


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
        sidecar = path.with_name(path.name + ".run.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_locked(path, "ab+")
            if overwrite:
                self._file.truncate(0)
            if os.fstat(self._file.fileno()).st_size:
                _check_same(sidecar, run, path)
                self._take_up(retry)
            else:
                _write_json(sidecar, {"format": _FORMAT, **run})
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
        self._cut_half_line()
        if retry:
            self._drop_errors()
        for answer in self._answers():
            self._count(answer)

    def _cut_half_line(self) -> None:
        size = end = os.fstat(self._file.fileno()).st_size
        while end:
            start = max(0, end - (1 << 16))
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)

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
        kept = _open_locked(part, "ab+")  # locked before it takes the name
        kept.truncate(0)
        for answer in self._answers():
            if answer["error"] is None:
                kept.write(to_json(answer))
        kept.flush()
        os.fsync(kept.fileno())
        part.replace(self.path)
        self._file.close()
        self._file = kept


def _open_locked(path: Path, mode: str) -> BinaryIO:
    file: Any = path.open(mode)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the file is closed, by a kill too
    except OSError as error:
        file.close()
        raise ConfigError(f"another process is writing {path}; wait for it, or choose another --output") from error
    return file


def _check_same(sidecar: Path, run: dict[str, Any], path: Path) -> None:
    try:
        before = json.loads(sidecar.read_bytes())
        before.pop("format")
    except (OSError, ValueError, KeyError, AttributeError):
        raise ConfigError(f"{path} is not empty, and no {sidecar.name} says which run wrote it; {_CURE}") from None
    now = json.loads(json.dumps(run))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in names)
        raise ConfigError(f"{path} holds answers of another run ({changes}); give the same again, {_CURE}")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
