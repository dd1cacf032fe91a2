"""A downstream with a limit of its own, in a process of its own: the example workers' carrier, and what it has seen.

It keeps the only account of the calls that the tests believe.
"""

from __future__ import annotations

import json
import subprocess
import sys
from bisect import bisect_right
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

from workers import carrier

ROOT = Path(__file__).parents[2]


class Trouble(Exception):
    """It answered with something else than 201. ``status_code`` is that."""

    status_code = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as the downstream saw it."""

    at: float
    number: int
    status: int


class Served:
    """The downstream in a process of its own, as a test sees it."""

    def __init__(self, limit: int) -> None:
        command = [sys.executable, "-m", carrier.__name__, "--port", "0", "--limit", str(limit)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait(timeout=15)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def go_down(self, period: float) -> None:
        """Answer 503 for so many seconds."""
        _ask(self.port, "POST", "/admin", json.dumps({"down_for": period}))

    def calls(self) -> list[Call]:
        """Every call so far, in the order in which they came."""
        return [Call(at, int(id), status) for at, id, status in json.loads(_ask(self.port, "GET", "/calls"))]


def _ask(port: int, method: str, path: str, body: str | None = None) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=15)
    try:
        connection.request(method, path, body)
        return connection.getresponse().read()
    finally:
        connection.close()


def call(port: int, number: int) -> int:
    """One call of a worker. Raises Trouble for any answer but 201."""
    connection = HTTPConnection("127.0.0.1", port, timeout=15)
    try:
        connection.request("POST", "/labels", json.dumps({"order_id": number}))
        status = connection.getresponse().status
    finally:
        connection.close()
    if status != 201:
        trouble = Trouble(f"the downstream answered {status} to call {number}")
        trouble.status_code = status
        raise trouble
    return number


def busiest(instants: list[float], window: float = 1.0) -> int:
    """The most of these instants that any window holds, its end not counted."""
    ordered = sorted(instants)
    return max((index + 1 - bisect_right(ordered, at - window) for index, at in enumerate(ordered)), default=0)


def most_overtaken(calls: list[Call]) -> float:
    """The longest time by which a call came after one that was sent later."""
    first: dict[int, float] = {}
    for each in calls:
        if each.status == 201:
            first.setdefault(each.number, each.at)
    worst, soonest_later = 0.0, float("inf")
    for number in sorted(first, reverse=True):
        worst = max(worst, first[number] - soonest_later)
        soonest_later = min(soonest_later, first[number])
    return worst
