"""Screen: what the chat writes. Answers are plain text; all else is decoration, which a pipe does not get."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable
from typing import TextIO

DIM, RED, BOLD, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[1m", "\x1b[0m"
_TO_LINE_START = "\r\x1b[K"
_MOST_COLUMNS = 100  # longer lines are hard to read
_HIDDEN = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},  # their pictures: ESC is seen as such
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),  # among them CSI in one byte
    **dict.fromkeys((0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),  # reordering
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),  # lone surrogates
}


def printable(text: str) -> str:
    """``text`` with nothing in it that a terminal obeys, or by which it shows text in another order."""
    return text.translate(_HIDDEN)


class Wrap:
    """Text broken between words while it streams through. White space at both ends is left out.

    Args:
        columns: terminal cells of a line; None passes lines through as they are.
    """

    def __init__(self, columns: int | None):
        self._columns = columns
        self._column = 0
        self._gap = self._word = ""
        self._begun = False

    def feed(self, text: str) -> str:
        """What can be shown now; a word stays back until it is whole."""
        shown = []
        for character in text:
            if character.isspace():
                shown.append(self._flush())
                self._gap += "    " if character == "\t" else character
            elif cells(character) == 2:  # Chinese, Japanese: a line may end after every character
                shown += [self._flush(), self._place(character)]
            else:
                self._word += character
        if self._columns is None:
            shown.append(self._flush())
        return "".join(shown)

    def end(self) -> str:
        return self._flush()

    def _flush(self) -> str:
        word, self._word = self._word, ""
        return self._place(word) if word else ""

    def _place(self, word: str) -> str:
        gap, self._gap = self._gap, ""
        if not self._begun:
            gap, self._begun = "", True
        if self._columns is None:
            return gap + word
        lines, _, indent = gap.rpartition("\n")
        if "\n" in gap:
            self._column, gap = 0, lines + "\n" + indent
        width = cells(word)
        if self._column and self._column + len(indent) + width > self._columns:
            gap, indent, self._column = "\n", "", 0
        self._column += len(indent) + width
        if self._column > self._columns:  # a word longer than a line: the terminal breaks it
            self._column = (self._column - 1) % self._columns + 1
        return gap + word


def cells(text: str) -> int:
    """Columns that ``text`` takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Screen:
    """Args:
    decorated: a person is looking; else answers alone go to ``out``, and what went wrong to ``err``.
    colored: escape sequences may be written.
    """

    def __init__(
        self,
        decorated: bool,
        colored: bool,
        out: TextIO | None = None,
        err: TextIO | None = None,
        columns: Callable[[], int] = lambda: shutil.get_terminal_size().columns,
    ):
        self.decorated, self._colored = decorated, decorated and colored
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._columns = columns
        self._wrap: Wrap | None = None  # of the answer that is being written
        self._waits = False

    # ---- answers

    def wait(self, seconds: int) -> None:
        """Nothing has come for so long; the line goes away with the first text."""
        if self._colored:
            self._waits = True
            self._write(f"{_TO_LINE_START}{DIM}... {seconds} s{PLAIN}")

    def answer(self, text: str) -> None:
        """The next piece of an answer."""
        self._clear_wait()
        if self._wrap is None:
            self._wrap = Wrap(self._width())
        self._write(self._wrap.feed(printable(text)))

    def end_answer(self) -> None:
        self._clear_wait()
        if self._wrap is not None:
            self._write(self._wrap.end() + "\n")
            self._wrap = None
        elif not self.decorated:
            self._write("\n")  # an empty answer still has its line

    # ---- all else

    def note(self, text: str) -> None:
        """A line about the chat itself."""
        if self.decorated:
            self._line(text, DIM)

    def say(self, text: str) -> None:
        """As :meth:`note`, in the color of the text."""
        if self.decorated:
            self._line(text, "")

    def title(self, text: str) -> None:
        if self.decorated:
            self._line(text, BOLD)

    def tell(self, text: str) -> None:
        """As :meth:`note`, where nobody is looking too."""
        if self.decorated:
            self.note(text)
        else:
            print(printable(text), file=self._err, flush=True)

    def error(self, text: str) -> None:
        """One line on what went wrong."""
        self._clear_wait()
        text = "error: " + " ".join(printable(text).split())
        if self.decorated:
            self._line(text, RED)
        else:
            print(text, file=self._err, flush=True)

    def _line(self, text: str, style: str) -> None:
        wrapped = []
        for line in printable(text).split("\n"):
            wrap = Wrap(self._width())
            indent = line[: len(line) - len(line.lstrip())]
            wrapped.append(indent + wrap.feed(line) + wrap.end())
        text = "\n".join(wrapped)
        self._write(f"{style}{text}{PLAIN}\n" if style and self._colored else f"{text}\n")

    def _width(self) -> int | None:
        # The last column stays empty: some terminals have broken the line by then.
        return max(8, min(self._columns() - 1, _MOST_COLUMNS)) if self.decorated else None

    def _clear_wait(self) -> None:
        if self._waits:
            self._waits = False
            self._write(_TO_LINE_START)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def open_screen() -> Screen:
    """The screen that suits standard input and output."""
    colored = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return Screen(sys.stdin.isatty() and sys.stdout.isatty(), colored)
