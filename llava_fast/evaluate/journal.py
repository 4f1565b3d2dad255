"""Journal: what was asked and answered, one JSON object a line, so that no answer is asked for, or paid for, twice.

Lines are only ever appended, and are tied to questions, prompts and judge; see :mod:`llava_fast.appended`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_fast.appended import cut_half_line, open_locked, tie_to_run
from llava_fast.errors import ConfigError
from llava_fast.evaluate.files import Row

KEY = "key"
_ANOTHER = "choose another --out"


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
        try:
            self._file = open_locked(path, _ANOTHER)
            if overwrite:
                self._file.truncate(0)
            if tie_to_run(path, run, f"{_ANOTHER}, or add --overwrite to delete what it holds"):
                self._take_up()
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

    def _take_up(self) -> None:
        cut_half_line(self._file)
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            try:
                row = json.loads(line)
                self.rows[row[KEY]] = row
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"line {number} of {self.path} is damaged: {line[:60]!r}; delete that line to have it asked again"
                ) from None
