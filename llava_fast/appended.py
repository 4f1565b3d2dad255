"""Files that runs append lines to: one writer at a time, no half lines, and nothing of another run's.

Whatever stops a run, what was written stands; a line that a kill left half-written is cut off at the next start. Beside
``answers.jsonl`` may lie ``answers.jsonl.run.json``: what the lines depend on. A run in which any of that is different
does not go on with the file.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from llava_fast.errors import ConfigError

_FORMAT = 1


def open_locked(path: Path, cure: str, buffering: int = -1) -> BinaryIO:
    """A file to append to and to read, made when it does not exist, with its folder.

    Args:
        cure: what else than waiting to do when it is in use, such as "choose another folder".

    Raises:
        ConfigError: another process has it open.
        OSError: it cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file: Any = path.open("ab+", buffering=buffering)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the file is closed, by a kill too
    except OSError as error:
        file.close()
        raise ConfigError(f"another process is writing {path}; wait for it, or {cure}") from error
    return file


def cut_half_line(file: BinaryIO) -> None:
    """Take off what stands behind the last end of a line."""
    size = end = os.fstat(file.fileno()).st_size
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def tie_to_run(path: Path, run: dict[str, Any], cure: str) -> bool:
    """Note what a file's lines depend on if it is empty, else check that it is the same.

    Args:
        run: as JSON holds it.
        cure: what to do about lines of another run.

    Returns:
        Whether there are lines.

    Raises:
        ConfigError: the lines are of another run, or nothing says of which.
        OSError: the note cannot be written.
    """
    note = path.with_name(path.name + ".run.json")
    if not path.stat().st_size:
        part = note.with_name(note.name + ".part")
        part.write_text(json.dumps({"format": _FORMAT, **run}, indent=2) + "\n", encoding="utf-8")
        part.replace(note)
        return False
    try:
        before = json.loads(note.read_bytes())
        before.pop("format")
    except (OSError, ValueError, KeyError, AttributeError):
        raise ConfigError(f"{path} is not empty, and no {note.name} says which run wrote it; {cure}") from None
    now = json.loads(json.dumps(run))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in names)
        raise ConfigError(f"{path} holds lines of another run ({changes}); give the same again, {cure}")
    return True
