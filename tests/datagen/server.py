"""A chat-completions server on loopback that can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PASSING = ("429", "500", "timeout", "cut", "garbage", "empty choices")


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 drops connections that come at once


class Server:
    """Args:
    answer: the good answer to messages.
    script: what is done with the requests of equal messages, in turn; the last goes on. An entry is "good", one of
        PASSING, "401", "400", or a text that is sent as the answer.
    hang: seconds that "timeout" takes. delay: seconds that every answer takes.

    Attributes:
        log: what was done with each request: (entry, last message).
    """

    def __init__(self, answer: Callable[[list], str], script: Callable[[list], list[str]], hang=2.0, delay=0.0):
        self.answer, self.script, self.hang, self.delay = answer, script, hang, delay
        self.log: list[tuple[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer._serve(self)

            def log_message(self, *_):
                pass

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def done(self, entry: str) -> int:
        return sum(one == entry for one, _ in self.log)

    def _serve(self, http):
        body = json.loads(http.rfile.read(int(http.headers["content-length"])))
        messages = body["messages"]
        key = json.dumps(messages)
        with self._lock:
            script = self.script(messages)
            entry = script[min(self._asked[key], len(script) - 1)]
            self._asked[key] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.delay)
        with self._lock:  # before the answer goes out, or the client's next request might be counted beside this one
            self._at_once -= 1
            place = len(self.log)
            self.log.append((entry, messages[-1]["content"]))
        try:
            self._send(http, entry, messages)
        except OSError:  # the client has gone
            self.log[place] = ("gone", messages[-1]["content"])

    def _send(self, http, entry, messages):
        if entry in ("429", "500", "401", "400"):
            return self._reply(http, int(entry), {"error": {"message": f"told to answer {entry}", "code": None}})
        if entry == "timeout":
            time.sleep(self.hang)
            return None
        if entry == "garbage":
            return self._raw(http, 200, b"<html>out of order</html>", "text/html")
        text = self.answer(messages) if entry in ("good", "cut", "empty choices") else entry
        finish = "length" if text.endswith("...") else "stop"
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "fake",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
        if entry == "empty choices":
            reply["choices"] = []
        if entry == "cut":
            raw = json.dumps(reply).encode()
            http.send_response(200)
            http.send_header("content-type", "application/json")
            http.send_header("content-length", str(len(raw)))
            http.end_headers()
            http.wfile.write(raw[: len(raw) // 2])
            http.close_connection = True
            return None
        return self._reply(http, 200, reply)

    def _reply(self, http, status, value):
        self._raw(http, status, json.dumps(value).encode(), "application/json")

    def _raw(self, http, status, raw, kind):
        http.send_response(status)
        http.send_header("content-type", kind)
        http.send_header("content-length", str(len(raw)))
        if status == 429:
            http.send_header("retry-after", "0.05")
        http.end_headers()
        http.wfile.write(raw)
