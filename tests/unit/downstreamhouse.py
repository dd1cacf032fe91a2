"""An application of a test's own, and a task whose downstream can be down."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from taskguard import Retry
from taskguard.downstream.service import Downstream
from tests.unit.rehearsal import NOWHERE, declare, make_app


class Down(Exception):
    """The other side is down."""


@pytest.fixture
def taskguard_app(monkeypatch: pytest.MonkeyPatch) -> Celery:
    """An application of the test's own, whose servers are elsewhere."""
    monkeypatch.setenv("CELERY_BROKER_URL", NOWHERE)
    return make_app()


@pytest.fixture
def ran() -> list[Any]:
    """What the bodies did, in order."""
    return []


@pytest.fixture
def circuit() -> dict[str, Any]:
    """A circuit that opens at the second failure and probes after ten seconds."""
    return {
        "minimum_calls": 2, "wait_in_open": 10, "backoff": 2, "slow_start": 4, "expected": (Down,),
    }  # fmt: skip


class Line:
    """A downstream that can be down, and the task that calls it."""

    def __init__(self, app: Celery, ran: list[Any], *, task: dict[str, Any] | None = None, **declared: Any) -> None:
        self.downstream = Downstream("line", **declared)
        self.down = False
        self.ran = ran
        self.app = app

        def call(n: int) -> int:
            self.ran.append(n)
            if self.down:
                raise Down(n)
            return n

        options = {"retry": Retry(max_retries=0), **(task or {})}
        self.task = declare(app, call, name="call", downstream=self.downstream, **options)

    def send(self, *numbers: int) -> list[Any]:
        """Send a task for each number."""
        return [self.task.delay(number) for number in numbers]
