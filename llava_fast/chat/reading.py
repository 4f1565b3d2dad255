"""Where the lines come from: prompt_toolkit, plain input, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

PROMPT, CONTINUATION = "> ", ". "
INSTALL = "no line editing and no history: pip install 'llava-fast[chat]'"


class Reader(Protocol):
    def read(self) -> str:
        """The next entry, without white space at its ends.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C.
        """


class Pipe:
    """One entry a line."""

    def read(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()


class Plain:
    """``input``; a backslash at the end of a line goes on with the next."""

    def read(self) -> str:
        lines = [input(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(CONTINUATION))
        return "\n".join(lines).strip()


class Editor:
    """prompt_toolkit: editing, history with search, completion of commands and paths, several lines.

    Args:
        history: file, made with its folder; None keeps none.
        commands: completed after a slash.

    Raises:
        ImportError: prompt_toolkit is not installed.
        OSError: the history cannot be written.
    """

    def __init__(self, history: Path | None, commands: Iterable[str]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory

        self._session: Any = PromptSession(
            history=None if history is None else FileHistory(str(_private(history))),
            completer=_completer(tuple(commands)),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=CONTINUATION,
            key_bindings=_keys(),
        )

    def read(self) -> str:
        return self._session.prompt(PROMPT).strip()


def _private(path: Path) -> Path:
    """``path``, made so that nobody else can read it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    return path


def default_history() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "llava_fast" / "chat_history"


def _keys() -> Any:
    """Enter sends; Alt-Enter, Ctrl-J, or a backslash before Enter makes a line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and not buffer.document.text_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(commands: tuple[str, ...]) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        """Names after a slash, then paths."""

        def get_completions(self, document: Document, event: Any) -> Any:
            line = document.text_before_cursor
            command, space, rest = line.partition(" ")
            if space and command in ("/image", "/save"):
                yield from paths.get_completions(Document(rest), event)
            elif not space and line.startswith("/"):
                yield from (Completion(name, -len(line)) for name in commands if name.startswith(line))

    return Commands()
