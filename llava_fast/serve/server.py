"""uvicorn around the app: limits of the connection, and an end that loses no answer."""

from __future__ import annotations

import logging
import sys
import time
from types import FrameType

import uvicorn

from llava_fast.engine import Engine
from llava_fast.serve.app import create_app
from llava_fast.serve.gate import Gate
from llava_fast.serve.settings import Settings
from llava_fast.serve.slow_clients import limited

_HEAD_BYTES = 1 << 15
_LAST_SECONDS = 5  # for the last bytes of answers to be sent
_TURNED_AWAY = 64  # connections over those being worked on: for health, metrics, and to be told 503


def serve(engine: Engine, settings: Settings, *, host: str, port: int, access_log: bool) -> int:
    """Serve until SIGTERM or SIGINT, and then until what runs is done. Returns the exit code."""
    _log(access_log)
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        ws="none",
        http=limited(settings.head_seconds, settings.send_seconds),
        h11_max_incomplete_event_size=_HEAD_BYTES,
        limit_concurrency=2 * settings.max_concurrent + _TURNED_AWAY,
        backlog=1024,
        server_header=False,
        proxy_headers=False,  # who stands in front is told by --host and the proxy's own log
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = DrainingServer(config, app.state.gate)
    server.run()
    return 0 if server.started else 2


class DrainingServer(uvicorn.Server):
    """On the first signal the gate is shut, and the port stays open: who comes is told to come back. The server ends
    once nothing runs any more, or after ``drain_seconds``; on a second signal at once."""

    def __init__(self, config: uvicorn.Config, gate: Gate):
        super().__init__(config)
        self._gate = gate
        self._until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self._until = 0.0
        else:
            self._gate.draining = True
            self._until = time.monotonic() + self._gate.settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining:
            late = time.monotonic() >= self._until
            if late:
                self._gate.give_up()
            if late or not self._gate.running:
                self.should_exit = True
        return await super().on_tick(counter)

    def _log_started_message(self, listeners: object) -> None:
        for socket in (socket for server in self.servers for socket in server.sockets):
            host, port = socket.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(
                f"ready: http://{shown}:{port}/ (chat page), http://{shown}:{port}/v1 (API)",
                file=sys.stderr,
                flush=True,
            )


def _log(access: bool) -> None:
    """What goes to stderr: warnings and errors as text, the access log as JSON."""
    text, plain = logging.StreamHandler(), logging.StreamHandler()
    text.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("llava_fast", "uvicorn"):
        logging.getLogger(name).addHandler(text)
        logging.getLogger(name).setLevel(logging.WARNING)
    lines = logging.getLogger("llava_fast.serve.access")
    lines.addHandler(plain)
    lines.propagate = False
    lines.setLevel(logging.INFO if access else logging.WARNING)
