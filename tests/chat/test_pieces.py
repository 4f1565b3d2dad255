"""What the chat is made of: names of pictures, text on a terminal, conversations as files, pictures from the web."""

from __future__ import annotations

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from llava_fast.chat.conversation import Conversation, Picture, Turn
from llava_fast.chat.pictures import dropped, fetch, names_in, open_picture
from llava_fast.chat.saving import save
from llava_fast.chat.screen import Screen, Wrap, cells, printable
from llava_fast.data.samples import load_samples
from llava_fast.errors import ConfigError, ImageError


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("one.png", "two words.png", "it's.png")]
    for path in paths:
        Image.new("RGB", (4, 3), "red").save(path)
    return [str(path) for path in paths]


def test_pictures_as_terminals_name_them(files):
    one, spaced, apostrophe = files
    assert names_in(f"  {spaced} ") == [spaced]
    assert names_in(f"'{spaced}' {one}") == [spaced, one]
    assert names_in(spaced.replace(" ", "\\ ")) == [spaced]
    assert names_in(apostrophe) == [apostrophe]
    assert names_in("file://" + spaced.replace(" ", "%20")) == [spaced]
    assert names_in("HTTPS://example.com/a b.png") == ["HTTPS://example.com/a b.png"]
    assert dropped(f"'{spaced}' '{one}'") == [spaced, one]
    assert not dropped("/image") and not dropped("What is in one.png?") and not dropped("/no/such/file.png")


def test_nothing_that_a_terminal_obeys_is_written():
    nasty = "a\x1b]0;title\x07b\x9b31mc\rd\u202ee\x7f\ud800\n\tf"
    shown = printable(nasty)
    assert not any(c in shown for c in "\x1b\x07\x9b\r\u202e\x7f\ud800") and "\n\tf" in shown
    out = io.StringIO()
    screen = Screen(True, False, out, out, columns=lambda: 40)
    screen.answer("\x1b[2Jgone")
    screen.end_answer()
    assert out.getvalue() == "\u241b[2Jgone\n"


@pytest.mark.parametrize("columns", [12, 20, 33])
def test_words_are_wrapped_as_they_stream(columns):
    text = "A small red diamond is at the top right.\n\n  indented 漢字漢字漢字漢字 and averyveryverylongword.\n"
    whole = Wrap(columns)
    expected = whole.feed(text) + whole.end()
    by_letter = Wrap(columns)
    assert "".join(by_letter.feed(c) for c in text) + by_letter.end() == expected
    assert expected.split() != [] and "".join(expected.split()) == "".join(text.split())
    lines = [line for line in expected.split("\n") if "averyvery" not in line]  # which is longer than any line
    assert all(cells(line) <= columns for line in lines)


def test_a_saved_conversation_is_training_data(files, tmp_path):
    picture = open_picture(files[0])
    talk = Conversation(turns=[Turn("What?", (picture, picture), "A \ud800 thing."), Turn("And?", (), "No.")])
    save(talk, tmp_path / "talk.json", "llava")
    sample = load_samples([tmp_path / "talk.json"], None)[0]
    assert sample["conversations"][0]["value"] == "<image>\n<image>\nWhat?" and len(sample["image"]) == 2
    save(talk, tmp_path / "messages.json", "messages")
    messages = json.loads((tmp_path / "messages.json").read_text())["messages"]
    assert [part.get("image") for part in messages[0]["content"]] == [files[0], files[0], None]
    assert not list(tmp_path.glob("*.part"))
    marked = Conversation(turns=[Turn("a <image>?", (picture,), "b")])
    with pytest.raises(ConfigError, match="/save messages"):
        save(marked, tmp_path / "marked.json", "llava")
    with pytest.raises(ConfigError, match="nothing to save"):
        save(Conversation(), tmp_path / "none.json", "llava")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(talk, tmp_path / "no" / "folder.json", "llava")


def test_what_was_talked_about_stays(files):
    """A file that changes later does not change the conversation."""
    picture = open_picture(files[0])
    Image.new("RGB", (4, 3), "blue").save(files[0])
    assert picture.image.getpixel((0, 0)) == (255, 0, 0)
    assert isinstance(picture, Picture)


@pytest.fixture
def web(files):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/inside":
                self.send_response(302)
                self.send_header("location", f"file://{files[0]}")
                return self.end_headers()
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            if self.path == "/slow":
                time.sleep(1)
            self.wfile.write(b"x" * 5000 if self.path == "/large" else Path(files[0]).read_bytes())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pictures_from_the_web(web, files):
    assert fetch(web + "/picture") == Path(files[0]).read_bytes()
    assert open_picture(web + "/picture").image.size == (4, 3)
    for path, limits, message in (
        ("/none", {}, "Not Found"),
        ("/large", {"max_bytes": 1000}, "more than"),
        ("/slow", {"seconds": 0.2}, "not there within"),
        ("/inside", {}, "cannot be fetched"),  # a redirect to a file of this machine
    ):
        with pytest.raises(ImageError, match=message):
            fetch(web + path, **limits)
