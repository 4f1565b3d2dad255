"""A judge served over local HTTP that can misbehave, a small checkpoint, and a small set of questions."""

from __future__ import annotations

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

import llava_fast as lf
from llava_fast.processor import Processor, Tokenizer
from llava_fast.train.demo import PARTS


class Served:
    """An OpenAI-compatible address. ``say`` makes the answer; ``faults`` are (status, body) for the next requests."""

    def __init__(self):
        self.say = lambda body: "8 6\nThe first is better."
        self.faults: list[tuple[int, str]] = []
        self.asked: list[dict] = []
        self._lock = threading.Lock()
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with served._lock:
                    fault = served.faults.pop(0) if served.faults else None
                    if fault is None:
                        served.asked.append(body)
                status, text = fault or (200, completion(served.say(body)))
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


def completion(text: str) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]} | {"usage": usage}
    )


@pytest.fixture
def served():
    pytest.importorskip("openai", reason="the openai client is an extra: pip install 'llava-fast[datagen]'")
    judge = Served()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A model of the tiny preset's widths, two layers, random weights, on disk."""
    tiny = lf.ModelConfig.preset("tiny")
    config = tiny.replace(
        text=dataclasses.replace(tiny.text, num_hidden_layers=2, max_position_embeddings=1024),
        vision=dataclasses.replace(tiny.vision, num_hidden_layers=2),
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    lf.save(lf.Llava(config, seed=1), Processor.from_config(config, Tokenizer.load(PARTS / "decoder")), folder)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bench(tmp_path):
    """A folder as ``--bench`` takes it (six questions about two pictures), and answers to it."""
    folder = tmp_path / "bench"
    (folder / "images").mkdir(parents=True)
    kinds = ("conv", "detail", "complex")
    rows = [(n, f"{n // 3:03d}.jpg", f"Question {n}?", f"llava_bench_{kinds[n % 3]}") for n in range(6)]
    names = ("question_id", "image", "text", "category")
    write_lines(folder / "questions.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    write_lines(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"Reference {n}"} for n in range(6)])
    write_lines(folder / "context.jsonl", [{"id": n, "image": f"{n:03d}.jpg", "caption": f"Told {n}"} for n in (0, 1)])
    write_lines(tmp_path / "answers.jsonl", [{"question_id": n, "text": f"Candidate {n}"} for n in range(6)])
    for n in (0, 1):
        Image.new("RGB", (60, 40), (200, 30 * n, 90)).save(folder / "images" / f"{n:03d}.jpg")
    return folder
