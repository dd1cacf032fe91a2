"""Limits by rules inside tasks: what is over a limit is queued for its slot, not lost (a task is deferred, unspent)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from celery import Celery

from taskguard import Retry
from taskguard.edge import rate_limit
from taskguard.limiter.identity import TaskIdentity
from taskguard.limiter.limiter import Limiter
from taskguard.limiter.rulebook import FixedRules
from taskguard.rules import Rule
from taskguard.stores.memory import MemoryPermits
from taskguard.testing import Reliable
from tests.unit.rehearsal import NOWHERE, declare, make_app

ONCE = Retry(max_retries=0)


@pytest.fixture
def taskguard_app(monkeypatch: pytest.MonkeyPatch) -> Celery:
    """An application of the test's own, whose servers are elsewhere."""
    monkeypatch.setenv("CELERY_BROKER_URL", NOWHERE)
    return make_app()


@pytest.fixture
def ran() -> list[Any]:
    """What the bodies did, in order."""
    return []


def test_a_decorated_call_over_its_limit_defers_the_task_to_its_slot(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any]
) -> None:
    """One by one, in order, and no attempt is spent."""

    @rate_limit("1/second burst=1", store=MemoryPermits(reliable.clock), name="bank")
    def charge(order: int) -> None:
        ran.append(order)

    def body(order: int) -> int:
        charge(order)
        return order

    task = declare(taskguard_app, body, name="charge", retry=ONCE)
    began = reliable.clock()
    results = [task.delay(n) for n in range(4)]
    reliable.drain()
    assert ran == [0]
    assert [round((message.due_at or 0) - began, 2) for message in reliable.waiting] == [1.0, 2.0, 3.0]
    reliable.drain(until="idle")
    assert ran == [0, 1, 2, 3]
    assert [result.state for result in results] == ["SUCCESS"] * 4


def test_a_rule_says_whose_task_waits(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """By tenant, told by the task's arguments; another tenant's task does not wait."""
    rule = Rule(id="tenants", client="*", task="shop.*", limits="1/minute burst=1", over_limit="queue")
    limiter = Limiter(FixedRules(rule), MemoryPermits(reliable.clock))

    def body(order: dict[str, Any]) -> None:
        limiter.permit(identity.of((order,), {}))
        ran.append(order["id"])

    identity = TaskIdentity("shop.charge", inspect.signature(body), client="{order[tenant]}")
    task = declare(taskguard_app, body, name="shop.charge", retry=ONCE)
    for id, tenant in enumerate(("acme", "acme", "bolt", "acme")):
        task.delay({"id": id, "tenant": tenant})
    reliable.drain()
    assert ran == [0, 2]
    assert len(reliable.waiting) == 2
    reliable.drain(until=61)
    assert ran == [0, 2, 1]
    reliable.drain(until="idle")
    assert ran == [0, 2, 1, 3]


def test_a_rule_that_refuses_defers_too(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """A task is never lost to a limit; without a slot of its own it comes back when it is told, with jitter."""
    rule = Rule(id="all", limits="1/minute burst=1")
    limiter = Limiter(FixedRules(rule), MemoryPermits(reliable.clock), clock=reliable.clock)

    @rate_limit(limiter=limiter, name="bank")
    def charge(order: int) -> None:
        ran.append(order)

    task = declare(taskguard_app, charge, name="charge", retry=ONCE)
    for n in range(3):
        task.delay(n)
    reliable.drain(until="idle")
    assert sorted(ran) == [0, 1, 2]
