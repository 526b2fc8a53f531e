"""An endpoint that acts after a fixed time: it searches a few times, then answers. What it says follows from the request."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TURNS = 5
"""Calls of an episode."""


class Endpoint:
    """Args:
    latency: seconds until an answer.
    """

    def __init__(self, latency: float) -> None:
        endpoint = self
        self.calls: Counter[int] = Counter()
        """Process that asked -> how often."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.calls[asked["process"]] += 1
                time.sleep(latency)
                said = json.dumps({"text": act(asked)}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                """A client that was killed."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/act"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def act(asked: dict[str, Any]) -> str:
    """The next action of an episode."""
    words = asked["question"].split()
    word = words[asked["seed"] % len(words)]
    if asked["turn"] + 1 < TURNS:
        return f'<tool_call>\n{{"name": "search", "arguments": {{"query": "{word}"}}}}\n</tool_call>'
    return f"<answer>{word}</answer>"
