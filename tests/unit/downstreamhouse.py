"""An application of a test's own, and a task whose downstream can be down."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
from celery import Celery

from taskguard import Retry
from taskguard.celery.runtime import Runtime
from taskguard.custody import Claimed, Entered, Resting
from taskguard.downstream.service import Downstream
from taskguard.envelope import Envelope
from taskguard.permits import Ask, Refusal
from taskguard.ports import MessageStore, PermitStore
from tests.unit.rehearsal import NOWHERE, declare, make_app


class StepByStep:
    """A `JointStore` of two stores: what runs on one server do in one step."""

    def __init__(self, store: MessageStore, permits: PermitStore) -> None:
        self._store, self._permits = store, permits

    def claim(
        self, envelope: Envelope, *, holder: str, lease: float, max_crashes: int, ask: Ask, resting: Resting | None
    ) -> Entered:
        """As the contract says."""
        claim = self._store.claim(envelope, holder=holder, lease=lease, max_crashes=max_crashes)
        if not isinstance(claim, Claimed) or claim.repeated:
            return Entered(claim)
        answer = self._permits.admit(ask)
        if resting is None or not isinstance(answer, Refusal) or answer.by == "circuit" or answer.slot_in is None:
            return Entered(claim, answer)
        due_at = ceil(round((self._permits.now() + answer.slot_in) * 1e6) / 1e3) / 1e3
        if envelope.deadline_at is not None and due_at >= envelope.deadline_at:
            return Entered(claim, answer)
        rested = self._store.rest(envelope.id, claim.token, resting.following, due_at=due_at, attempt=resting.attempt)
        return Entered(claim, answer, due_at if rested else None)


@pytest.fixture(params=["apart", "joined"], autouse=True)
def joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether claims and questions go to the store in one step. What comes of it is the same."""
    if request.param == "joined":
        monkeypatch.setattr(Runtime, "joined_with", lambda runtime, permits: StepByStep(runtime.store, permits))
    return bool(request.param == "joined")


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
