"""The chat in a real pseudo-terminal, and behind a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys

import pexpect
import pytest
import torch

import llava_fast as lf
from llava_fast.chat.__main__ import main
from llava_fast.pretrained import built_in

COLOR, COUNT, DETAIL = (
    "What color is the {}?",
    "How many shapes are there?",
    "Describe the picture with all its details.",
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")
ERASED = re.compile(r"[^\n]*\r\x1b\[K")  # a line that is begun anew: the seconds of a wait, gone when the answer comes
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
ENVIRONMENT["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody answers where the cursor is
CONTEXT = 1 << 15  # tokens
PASTED = "\x1b[?2004l"  # written by prompt_toolkit when an entry is complete, before the answer
SECONDS = 120  # for anything to appear: the machine may be busy


def listen_to_ctrl_c():
    """As in any terminal: who runs the tests in the background has it ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A chat that is typed into, as a careful person does it: never before the prompt is there."""

    def __init__(self, *arguments, columns=200, **environment):
        command = ["-m", "llava_fast.chat", "--temperature", "0", *map(str, arguments)]
        self.child = pexpect.spawn(
            sys.executable, command, env={**ENVIRONMENT, **environment}, encoding="utf-8", timeout=SECONDS,
            dimensions=(24, columns), preexec_fn=listen_to_ctrl_c,
        )  # fmt: skip
        self.wait("Ctrl-D leaves")
        self.prompted()

    def wait(self, text):
        """Up to ``text``, which must come, wherever its line breaks; returns what stood before it, escapes and all."""
        self.child.expect(r"\s+".join(map(re.escape, text.split(" "))))
        return self.child.before

    def prompted(self):
        """Until the next entry is asked for. What is typed before that goes through the terminal's own line editing."""
        self.child.expect(r"\x1b\[\?2004h|\n> ")  # prompt_toolkit wants to know what is pasted; or the plain prompt

    def ask(self, question):
        """The answer, in one line."""
        self.child.send(question + "\r")
        shown = self.wait("first token")
        self.wait("of 1,024")
        self.prompted()
        said = shown.rpartition(PASTED if PASTED in shown else question)[2]
        return " ".join(ESCAPES.sub("", ERASED.sub("", said)).split())

    def command(self, line, answer):
        """What is written up to ``answer``."""
        self.child.send(line + "\r")
        shown = self.wait(answer)
        self.prompted()
        return " ".join(ESCAPES.sub("", shown).split())

    def leave(self):
        self.child.sendeof()
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def chat(tmp_path):
    made = []

    def start(*arguments, **more):
        made.append(Terminal("--history", tmp_path / "history", *arguments, **more))
        return made[-1]

    yield start
    for terminal in made:
        terminal.child.close(force=True)


def test_a_conversation(chat, picture, greedy, tmp_path):
    """A picture, two turns, another try, the conversation saved, forgotten, and a last question in the history."""
    terminal = chat("--image", picture)
    expected = greedy([COUNT, DETAIL])
    assert terminal.ask(COUNT) == expected[0]
    assert terminal.ask(DETAIL) == expected[1]
    assert terminal.command("/retry", "first token").endswith(expected[1])
    saved = tmp_path / "talk.json"
    terminal.command(f"/save {saved}", "saved")
    sample = json.loads(saved.read_text())[0]
    assert sample["image"] == str(picture)
    assert [turn["value"] for turn in sample["conversations"]] == [
        f"<image>\n{COUNT}",
        expected[0],
        DETAIL,
        expected[1],
    ]
    terminal.command(f"/save {saved}", "saved")  # its own file may be written again
    terminal.command(f"/save {picture}", "is there already")
    terminal.command("/reset", "forgotten")
    terminal.command("/retry", "there is no answer to try again")
    terminal.command(f"/image {picture}", "goes with your next question")
    assert terminal.ask(COUNT) == expected[0]
    assert terminal.leave() == 0
    again = chat()
    again.child.send("\x1b[A")  # the last entry of the history
    again.wait(COUNT)
    again.child.sendintr()  # clears the line: Ctrl-D leaves an empty one alone
    again.wait("Ctrl-D or /quit leaves")
    again.prompted()
    assert again.leave() == 0


@pytest.fixture
def rambling(tmp_path):
    """The built-in model with an end of text that is never the likeliest token, and a context that takes it a minute to
    fill: its answers do not end by themselves."""
    model, processor = lf.load(built_in(), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos_id] = 0
    lf.save(model, processor, tmp_path / "rambling")
    config = tmp_path / "rambling" / "config.json"
    told = json.loads(config.read_text())
    told["text_config"]["max_position_embeddings"] = CONTEXT
    config.write_text(json.dumps(told))
    return tmp_path / "rambling"


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, picture, rambling):
    terminal = chat(rambling, "--image", picture, "--max-tokens", CONTEXT)
    terminal.child.send(COUNT + "\r")
    terminal.wait("shapes are there?")
    terminal.child.expect("[Tt]here (are|is)")
    terminal.child.sendintr()
    assert "first token" not in terminal.wait("stopped; what was said is kept")  # the line of an answer's end
    terminal.prompted()
    terminal.child.send("half a question")
    terminal.wait("half a question")  # it is the prompt that echoes it
    terminal.child.sendintr()
    terminal.wait("Ctrl-D or /quit leaves")
    terminal.prompted()
    terminal.command("/reset", "forgotten")
    assert terminal.child.isalive() and terminal.leave() == 0


def test_what_goes_wrong_is_one_line_and_the_chat_goes_on(chat, picture, greedy, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    terminal = chat()
    terminal.command("/image nowhere.png", "error: ")
    terminal.command(f"/image {tmp_path / 'bad.png'}", "error: ")
    terminal.command("/nonsense", "there is no command /nonsense; /help names them all")
    terminal.command(f"'{picture}'", "goes with your next question")  # dropped onto the terminal
    assert terminal.ask(COUNT) == greedy([COUNT])[0]
    terminal.child.send("\x1b[200~" + "long " * 3000 + "\x1b[201~")  # pasted
    terminal.command("", "/reset begins a new conversation")
    assert terminal.ask(COUNT) == greedy([COUNT, COUNT])[1]  # nothing was dropped
    assert terminal.leave() == 0


def test_without_line_editing(chat, picture, greedy, tmp_path):
    """prompt_toolkit is an extra: without it the chat says so, and works."""
    (tmp_path / "prompt_toolkit.py").write_text("raise ImportError('not here')")
    terminal = chat("--image", picture, PYTHONPATH=str(tmp_path))
    assert terminal.ask(COUNT) == greedy([COUNT])[0]
    assert terminal.leave() == 0


def piped(lines, *arguments):
    command = [sys.executable, "-m", "llava_fast.chat", "--temperature", "0", *map(str, arguments)]
    text = "".join(line + "\n" for line in lines)
    return subprocess.run(command, input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def test_behind_a_pipe_answers_alone_are_written(picture, greedy):
    done = piped([f"/image {picture}", COUNT, DETAIL])
    assert (done.returncode, done.stdout.splitlines()) == (0, greedy([COUNT, DETAIL]))
    assert done.stderr.startswith("the built-in tiny model") and len(done.stderr.splitlines()) == 1
    bad = piped(["/image nowhere.png", COUNT])
    assert bad.returncode == 1 and "nowhere.png" in bad.stderr and len(bad.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is no directory"),
        (["--device", "cuda:99"], "torch sees"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_errors_before_work(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and not said.out
