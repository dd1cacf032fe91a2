"""What really ran: every task body and every taskguard event of a test's workers, in one Redis list.

The list is neither the broker's nor the message store's, and outlives every worker, so a test can tell what happened
from what was reported. A body that must be caught in mid-run waits at a gate that the test opens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self

from redis import Redis

from taskguard.events import Event

GATE_PATIENCE = 150
"""Seconds a body waits at its gate before it gives up: more than its test waits for anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line. ``what`` is "started", "finished", "ready" (a worker), or the name of a taskguard event."""

    what: str
    task_id: str = ""
    name: str = ""
    token: int = 0
    attempt: int = 0
    crashes: int = 0
    detail: str = ""
    pid: int
    at: float


class Journal:
    """Written by workers, read by tests."""

    def __init__(self, url: str, namespace: str) -> None:
        self._redis = Redis.from_url(url, decode_responses=True, socket_timeout=GATE_PATIENCE + 5)
        self._list = f"{namespace}:journal"
        self._gates = f"{namespace}:gate:"

    def write(self, what: str, **fields: object) -> None:
        """Add a line."""
        entry = {"what": what, "pid": os.getpid(), "at": time.time(), **fields}
        self._redis.rpush(self._list, json.dumps(entry, default=str))

    def started(self, task: Any) -> None:
        """A reliable task's body begins."""
        held = task.custody
        self.write(
            "started", task_id=task.request.id, name=task.name, token=held.token, attempt=held.attempt,
            crashes=held.crashes,
        )  # fmt: skip

    def finished(self, task: Any) -> None:
        """It has reached its end."""
        self.write("finished", task_id=task.request.id, name=task.name, token=task.custody.token)

    def observe(self, event: Event) -> None:
        """A taskguard observer."""
        told = asdict(event)
        self.write(told["name"], task_id=told["task_id"], detail=told["detail"])

    def wait_at(self, gate: str) -> None:
        """In a body: wait until the test opens *gate*."""
        if self._redis.blpop([self._gates + gate], timeout=GATE_PATIENCE) is None:
            raise RuntimeError(f"nobody opened the gate {gate!r} within {GATE_PATIENCE} s")

    def first(self, mark: str) -> bool:
        """Whether nobody has asked with this *mark* before."""
        return bool(self._redis.set(f"{self._gates}first:{mark}", 1, nx=True, ex=3600))

    def open(self, gate: str) -> None:
        """Let everyone through *gate* who is there or comes later, up to a hundred."""
        self._redis.rpush(self._gates + gate, *["open"] * 100)

    def entries(self, what: str | Iterable[str] = "", task_id: str | None = None) -> list[Entry]:
        """The lines so far, the oldest first; of one kind or several, of one task."""
        kinds = {what} if isinstance(what, str) else set(what)
        lines = [Entry(**json.loads(line)) for line in self._redis.lrange(self._list, 0, -1)]
        return [
            line
            for line in lines
            if (kinds == {""} or line.what in kinds) and (task_id is None or line.task_id == task_id)
        ]

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()


@dataclass(frozen=True, slots=True)
class Deadline:
    """Polls conditions until a moment. Real processes tell nobody when they are done."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """The moment in *seconds* from now."""
        return cls(time.monotonic() + seconds)

    def reached(self, condition: Callable[[], object], *, every: float = 0.03) -> bool:
        """Whether *condition* became true in time; it is looked at *every* so many seconds."""
        while not condition():
            if time.monotonic() >= self.at:
                return False
            time.sleep(every)
        return True
