"""A log of conversations, for those who ask for one: a line of JSON for each request, images as their hashes."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from llava_fast.appended import cut_half_line, open_locked
from llava_fast.engine import Completion


class Conversations:
    """Raises:
    ConfigError: another process writes the file.
    OSError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self._file: BinaryIO = open_locked(path, "choose another file")
        self._lock = threading.Lock()
        cut_half_line(self._file)

    def write(self, request_id: str, tenant: str, asked: Any, completions: list[Completion]) -> None:
        """Append one line.

        Args:
            asked: messages with encoded images in them, or prompts.
        """
        row = {
            "time": round(time.time(), 3),
            "request_id": request_id,
            "tenant": tenant or None,
            "asked": asked,
            "answers": [
                {"text": output.text, "finish_reason": output.finish_reason}
                for completion in completions
                for output in completion.outputs
            ],
        }
        line = json.dumps(row, ensure_ascii=False, default=_hash).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _hash(image: bytes) -> str:
    return "sha256:" + hashlib.sha256(image).hexdigest()
