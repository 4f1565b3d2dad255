"""Session: the chat itself, one entry after the other: a question, a command, or pictures dropped in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llava_fast.chat.asking import Answer, ask
from llava_fast.chat.conversation import Conversation, Turn
from llava_fast.chat.pictures import dropped, is_address, names_in, open_picture
from llava_fast.chat.reading import Reader
from llava_fast.chat.saving import FORMS, save
from llava_fast.chat.screen import Screen
from llava_fast.engine import Completion, Engine, Request, SamplingParams
from llava_fast.errors import ConfigError, EngineClosedError, LlavaError, PromptTooLongError

HELP = """\
/image PATH or URL  add a picture to your next question
/reset              forget the conversation
/retry              answer the last question again
/save FILE          write the conversation in the LLaVA form
/save messages FILE the same in OpenAI's form
/quit               leave; Ctrl-D does too
A file dropped onto the terminal is a picture too. Ctrl-C stops an answer. Alt-Enter, or a backslash at the end, \
begins a new line. A question that begins with a slash: put a space before it."""


class Session:
    """Args:
    engine: one with a thread of its own.
    sampling: of every answer.
    quiet: no line of times after an answer.

    Attributes:
        failures: entries that came to nothing.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        screen: Screen,
        reader: Reader,
        *,
        system: str | None = None,
        quiet: bool = False,
    ):
        self._engine, self._sampling, self._screen, self._reader = engine, sampling, screen, reader
        self._quiet = quiet
        self._conversation = Conversation(system)
        self._attempt = 0  # of the last question
        self._saved: set[Path] = set()
        self.failures = 0

    def run(self) -> None:
        """Until the entries end or the user leaves.

        Raises:
            EngineClosedError: the engine has stopped.
            KeyboardInterrupt: Ctrl-C, where nobody is looking.
        """
        going = True
        while going:
            try:
                going = self._obey(self._reader.read())
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._screen.decorated:
                    raise
                self._screen.note("Ctrl-D or /quit leaves")

    def add_pictures(self, text: str) -> None:
        """Read the pictures that ``text`` names; they go with the next question.

        Raises:
            ImageError: one of them cannot be used; none is added.
        """
        pictures = [open_picture(name) for name in names_in(text)]
        self._conversation.waiting += pictures
        for picture in pictures:
            size = f"{picture.image.width}x{picture.image.height}"
            self._screen.note(f"picture {picture.name}, {size}: goes with your next question")

    def _obey(self, line: str) -> bool:
        """Returns whether to go on."""
        if not line:
            return True
        name, _, rest = line.partition(" ")
        try:
            if name == "/quit":
                return False
            if name in COMMANDS:
                COMMANDS[name](self, rest.strip())
            elif self._screen.decorated and dropped(line):
                self.add_pictures(line)
            elif line.startswith("/"):
                raise ConfigError(f"there is no command {name}; /help names them all")
            else:
                self._ask(Turn(line, tuple(self._conversation.waiting)))
        except EngineClosedError:
            raise
        except LlavaError as error:
            self._fail(error)
        return True

    # ---- asking

    def _ask(self, turn: Turn) -> None:
        self._attempt = 0
        if self._answered(turn):
            self._conversation.waiting.clear()

    def _answered(self, turn: Turn) -> bool:
        """Put the question and show the answer; returns whether the conversation now has both."""
        sampling = self._sampling
        if sampling.seed is not None:  # another try is another draw, and the same in every run
            sampling = replace(sampling, seed=sampling.seed + self._attempt)
        request = Request(messages=self._conversation.messages(turn), sampling=sampling)
        try:
            answer = ask(self._engine, request, self._screen.answer, self._screen.wait)
        finally:
            self._screen.end_answer()
        if answer.text or answer.completion:
            self._conversation.turns.append(replace(turn, answer=answer.text))
        if answer.completion is None and not self._screen.decorated:
            raise KeyboardInterrupt
        self._tell(answer)
        return bool(answer.text or answer.completion)

    def _tell(self, answer: Answer) -> None:
        if answer.completion is None:
            kept = "what was said is kept" if answer.text else "your question was taken back"
            self._screen.note(f"stopped; {kept}")
            return
        completion = answer.completion
        used = completion.prompt_tokens + len(completion.token_ids)
        if not self._quiet:
            self._screen.note(f"{times(completion)} · context {used:,} of {self._engine.max_length:,}")
        if completion.finish_reason != "length":
            return
        if len(completion.token_ids) < self._sampling.max_tokens:
            self._screen.note(f"the context of {self._engine.max_length:,} tokens is full; /reset begins anew")
        else:
            self._screen.note(f"cut off at --max-tokens {self._sampling.max_tokens}")

    def _fail(self, error: LlavaError) -> None:
        self.failures += 1
        if isinstance(error, PromptTooLongError) and self._conversation.turns:
            self._screen.error(f"{error}. Nothing was dropped; /reset begins a new conversation")
        else:
            self._screen.error(str(error))

    # ---- commands

    def _help(self, _: str) -> None:
        self._screen.say(HELP)

    def _image(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/image needs a path or an address: /image photo.jpg")
        if is_address(rest):
            self._screen.note(f"fetching {rest}")
        self.add_pictures(rest)

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._screen.note("forgotten; the next question begins a new conversation")

    def _retry(self, _: str) -> None:
        if not self._conversation.turns:
            raise ConfigError("there is no answer to try again")
        last = self._conversation.turns.pop()
        self._attempt += 1
        if self._sampling.greedy:
            self._screen.note("at --temperature 0 the answer will be the same")
        answered = False
        try:
            answered = self._answered(replace(last, answer=None))
        finally:
            if not answered:
                self._conversation.turns.append(last)

    def _save(self, rest: str) -> None:
        form, _, name = rest.partition(" ")
        if form not in FORMS or not name:
            form, name = "llava", rest
        if not name:
            raise ConfigError("/save needs a file: /save talk.json")
        path = Path(name.strip()).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise ConfigError(f"{path} is there already; choose another name")
        save(self._conversation, path, form)
        self._saved.add(path)
        self._screen.note(f"saved {path}")
        if form == "llava" and any(is_address(p.name) for turn in self._conversation.turns for p in turn.pictures):
            self._screen.note("pictures from the web are named by their address; download them to train on this file")


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/help": Session._help,
    "/image": Session._image,
    "/reset": Session._reset,
    "/retry": Session._retry,
    "/save": Session._save,
}


def times(completion: Completion) -> str:
    """The time to the first token, and the rate of those after it."""
    first, total, tokens = completion.first_token_s or 0.0, completion.total_s or 0.0, len(completion.token_ids)
    told = f"first token {first:.1f} s" if first >= 1 else f"first token {1000 * first:.0f} ms"
    told += f" · {tokens} tokens"
    return f"{told}, {(tokens - 1) / (total - first):.3g}/s" if tokens > 1 and total > first else told
