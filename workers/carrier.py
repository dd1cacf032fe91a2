"""A small carrier over HTTP that takes no more than it can: ``python -m workers.carrier --port 8081 --limit 50``.

POST /labels   {"order_id"}           201; 429 with Retry-After when the last second has seen as many as the limit
POST /admin    {"down_for", "limit"}  each optional: for ``down_for`` seconds it answers 503
GET  /calls    every call: [[seconds since 1970, order_id, status], ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any, dict[str, str]]


class Carrier(ThreadingHTTPServer):
    """Serves until `shutdown`. Port 0 takes a free one; ``server_port`` says which."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, limit: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.limit = limit
        self.down_until = 0.0
        self.calls: list[tuple[float, str, int]] = []
        self._lock = threading.Lock()
        self._last: deque[float] = deque()

    def label(self, order_id: str) -> Answer:
        """Answer one call, and write it down whatever the answer is."""
        with self._lock:
            now = time.time()
            while self._last and self._last[0] <= now - 1:
                self._last.popleft()
            answer = self._decide(order_id, now)
            self.calls.append((now, order_id, answer[0]))
            return answer

    def _decide(self, order_id: str, now: float) -> Answer:
        if now < self.down_until:
            return 503, {"error": "the carrier is down"}, {}
        if len(self._last) >= self.limit:
            return 429, {"error": f"more than {self.limit} a second"}, {"Retry-After": "1"}
        self._last.append(now)
        return 201, {"label": f"label-{order_id}"}, {}

    def administer(self, orders: dict[str, Any]) -> Answer:
        """Bring trouble, or end it."""
        with self._lock:
            if "down_for" in orders:
                self.down_until = time.time() + float(orders["down_for"])
            self.limit = int(orders.get("limit", self.limit))
        return 200, {}, {}


class _Handler(BaseHTTPRequestHandler):
    server: Carrier

    def do_GET(self) -> None:
        self._answer((200, self.server.calls, {}) if self.path == "/calls" else _nowhere(self.path))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        match self.path:
            case "/labels":
                self._answer(self.server.label(str(request["order_id"])))
            case "/admin":
                self._answer(self.server.administer(request))
            case path:
                self._answer(_nowhere(path))

    def _answer(self, answer: Answer) -> None:
        status, content, headers = answer
        body = json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the caller was killed while it waited

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet: the calls say it all."""


def _nowhere(path: str) -> Answer:
    return 404, {"error": f"{path} is not served here; see /labels, /admin and /calls"}, {}


def main() -> None:
    """Serve until told to stop. Prints the port."""
    parser = argparse.ArgumentParser(prog="python -m workers.carrier", description="A small carrier over HTTP.")
    parser.add_argument("--port", type=int, default=8081, help="0 takes a free one")
    parser.add_argument("--limit", type=int, default=50, help="labels a second")
    options = parser.parse_args()
    with Carrier(options.port, options.limit) as carrier:
        sys.stdout.write(f"{carrier.server_port}\n")
        sys.stdout.flush()
        try:
            carrier.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
