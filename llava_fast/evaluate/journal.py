"""Journal: what was asked and answered, one JSON object a line, so that no answer is asked for, or paid for, twice.

Lines are only ever appended, and a line that a kill left half-written is cut off at the next start. Beside
``reviews.jsonl`` lies ``reviews.jsonl.run.json``: what the lines depend on (questions, prompts, judge). A run in which
any of that is different does not go on with the file.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import Row, write_whole

KEY = "key"


class Journal:
    """The one writer of a file; a second one is refused while this one is open.

    Args:
        path: made when it does not exist, with its folder.
        run: what the lines depend on.
        overwrite: delete what the file holds.

    Attributes:
        rows: all lines by their key, those of earlier runs included.

    Raises:
        ConfigError: the file is of another run, damaged, in use, or cannot be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, overwrite: bool = False):
        self.path = path
        self.rows: dict[str, Row] = {}
        sidecar = path.with_name(path.name + ".run.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
            self._lock()
            if overwrite:
                self._file.truncate(0)
            if path.stat().st_size:
                _check_same(sidecar, run, path)
                self._take_up()
            else:
                write_whole(sidecar, json.dumps(run, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; choose an --out that can be written") from error

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def write(self, key: str, row: Row) -> None:
        """Append a line and hand it to the operating system. Raises OSError, on a full disk for instance."""
        line = json.dumps({KEY: key, **row}, ensure_ascii=False)
        self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        self.rows[key] = {KEY: key, **row}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the file is closed, by a kill too
        except OSError as error:
            self._file.close()
            raise ConfigError(f"another process writes {self.path}; wait for it, or choose another --out") from error

    def _take_up(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line)
                self.rows[row[KEY]] = row
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"line {number} of {self.path} is damaged: {line[:60]!r}; delete that line to have it asked again"
                ) from None
        self._file.truncate(whole)


def _check_same(sidecar: Path, run: dict[str, Any], path: Path) -> None:
    cure = "give the same again, choose another --out, or add --overwrite to delete what it holds"
    try:
        before = json.loads(sidecar.read_bytes())
        names = [name for name in {**before, **run} if before.get(name) != run.get(name)]
    except (OSError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not empty, and no {sidecar.name} says which run wrote it; {cure}") from None
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r:.60} then, {run.get(name)!r:.60} now" for name in names)
        raise ConfigError(f"{path} holds lines of another run ({changes}); {cure}")
