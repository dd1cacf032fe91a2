"""A small flaky bank over HTTP: ``python -m workers.bank --port 8080 --books books.sqlite``.

    POST /charges   {"order_id", "amount"}, header Idempotency-Key   201 charged, 200 charged before, 403 frozen, 422
    POST /refunds   {"charge_id"}                                    200, 404
    GET  /                                                           the books' totals and the troubles in force
    POST /admin     {"down_for", "retry_after", "limit", "delay", "slow", "frozen", "honour_keys"}, each optional

It is flaky when told to be: ``down_for`` seconds it answers 503 with ``Retry-After``; ``limit`` is how many charges it
answers in a second, 429 the others; ``delay`` slows every charge; ``slow`` maps an order to the seconds between its
charge and its answer: long enough to kill the worker that asked; orders in ``frozen`` are refused for good.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from workers.books import Books, KeyMismatch

Answer = tuple[int, dict[str, Any], dict[str, str]]


@dataclass(slots=True)
class Troubles:
    """What is wrong with the bank. ``down_until`` is a monotonic instant; delays are seconds."""

    down_until: float = 0.0
    retry_after: int = 1
    limit: int | None = None
    delay: float = 0.0
    slow: dict[str, float] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    honour_keys: bool = True


class Bank(ThreadingHTTPServer):
    """Serves until `shutdown`. Port 0 takes a free one; ``server_port`` says which."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, books: Path | str) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.path = str(books)
        self.books = Books(books)
        self.troubles = Troubles()
        self._lock = threading.Lock()
        self._last: deque[float] = deque()

    def charge(self, order: dict[str, Any], *, key: str | None, caller: str) -> Answer:
        """Answer one request for a charge, and write it into the books whatever the answer is."""
        order_id, amount = order.get("order_id"), order.get("amount")
        if not isinstance(order_id, str) or not isinstance(amount, int) or amount <= 0:
            return 422, {"error": f"a charge needs an order_id and an amount in cents, not {order!r}"}, {}
        call = self.books.open_call(order_id, key=key, caller=caller)
        answer = self._decide(order_id, amount, key if self.troubles.honour_keys else None)
        self.books.close_call(call, answer[0])
        return answer

    def _decide(self, order_id: str, amount: int, key: str | None) -> Answer:
        troubles = self.troubles
        time.sleep(troubles.delay)
        if time.monotonic() < troubles.down_until:
            return 503, {"error": "the bank is down"}, {"Retry-After": str(troubles.retry_after)}
        if troubles.limit is not None and self._exceeds(troubles.limit):
            return 429, {"error": f"more than {troubles.limit} charges a second"}, {"Retry-After": "1"}
        if order_id in troubles.frozen:
            return 403, {"error": "account frozen"}, {}
        try:
            charge = self.books.charge(order_id, amount, key=key)
        except KeyMismatch as exc:
            return 422, {"error": str(exc)}, {}
        if charge.replayed:
            return 200, {"charge_id": charge.id}, {"Idempotent-Replayed": "true"}
        time.sleep(troubles.slow.get(order_id, 0.0))
        return 201, {"charge_id": charge.id}, {}

    def _exceeds(self, limit: int) -> bool:
        """Whether the last second has seen as many as that; else this one is the next of them."""
        with self._lock:
            now = time.monotonic()
            while self._last and self._last[0] <= now - 1:
                self._last.popleft()
            if len(self._last) >= limit:
                return True
            self._last.append(now)
            return False

    def refund(self, request: dict[str, Any]) -> Answer:
        """Give a charge back; doing it again changes nothing."""
        charge_id = str(request.get("charge_id"))
        if self.books.refund(charge_id):
            return 200, {"charge_id": charge_id}, {}
        return 404, {"error": f"there is no charge {charge_id!r}"}, {}

    def administer(self, orders: dict[str, Any]) -> Answer:
        """Bring trouble, or end it."""
        known = {f.name for f in fields(Troubles)} - {"down_until"} | {"down_for"}
        unknown = sorted(orders.keys() - known)
        if unknown:
            return 422, {"error": f"unknown trouble {', '.join(unknown)}; known are {', '.join(sorted(known))}"}, {}
        if "down_for" in orders:
            self.troubles.down_until = time.monotonic() + float(orders.pop("down_for"))
        for name, value in orders.items():
            setattr(self.troubles, name, value)
        return self.status()

    def status(self) -> Answer:
        """The books' totals, and the troubles in force."""
        troubles = asdict(self.troubles)
        troubles["down_for"] = max(0.0, troubles.pop("down_until") - time.monotonic())
        return 200, {"books": self.path, **self.books.totals(), "troubles": troubles}, {}


class _Handler(BaseHTTPRequestHandler):
    server: Bank

    def do_GET(self) -> None:
        self._answer(self.server.status() if self.path == "/" else _nowhere(self.path))

    def do_POST(self) -> None:
        try:
            request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        except ValueError:
            request = None
        if not isinstance(request, dict):
            return self._answer((400, {"error": "send one JSON object"}, {}))
        match self.path:
            case "/charges":
                key, caller = self.headers.get("Idempotency-Key"), self.headers.get("User-Agent", "")
                return self._answer(self.server.charge(request, key=key, caller=caller))
            case "/refunds":
                return self._answer(self.server.refund(request))
            case "/admin":
                return self._answer(self.server.administer(request))
            case path:
                return self._answer(_nowhere(path))

    def _answer(self, answer: Answer) -> None:
        status, content, headers = answer
        body = json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the caller was killed while it waited

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet: the books say it all."""


def _nowhere(path: str) -> Answer:
    return 404, {"error": f"{path} is not served here; see /charges, /refunds and /admin"}, {}


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m workers.bank", description="A small flaky bank over HTTP.")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--books", default="bank.sqlite", help="the SQLite file of calls and charges")
    options = parser.parse_args()
    with Bank(options.port, options.books) as bank:
        try:
            bank.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            return
        finally:
            bank.books.close()


if __name__ == "__main__":
    main()
