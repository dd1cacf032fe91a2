"""Limits by rules inside tasks: what is over a limit is queued for its slot, not lost (a task is deferred, unspent)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from celery import Celery

from taskguard import ConfigurationError, Downstream, Retry, TokenBucket, headers
from taskguard.edge import rate_limit
from taskguard.envelope import Envelope
from taskguard.limiter.identity import TaskIdentity
from taskguard.limiter.limiter import Limiter
from taskguard.limiter.rulebook import FixedRules, RuleBook
from taskguard.record import State
from taskguard.rules import Rule
from taskguard.stores.memory import MemoryPermits
from taskguard.stores.memory.rules import MemoryRules
from taskguard.testing import Reliable
from tests.unit.rehearsal import NOWHERE, declare, make_app, noting

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


@pytest.fixture
def rules(reliable: Reliable, taskguard_app: Celery) -> MemoryRules:
    """The rules that the application's limited tasks go by, on the test's clock."""
    store = MemoryRules()
    limiter = Limiter(RuleBook(store), MemoryPermits(reliable.clock), clock=reliable.clock)
    taskguard_app.taskguard._limiter = limiter
    return store


def test_a_limited_task_goes_by_the_rules_of_its_name(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], rules: MemoryRules
) -> None:
    """Before any of its code runs: over the limit it waits for its slot, and no attempt is spent."""
    rules.put([Rule(id="shop", task="shop.*", limits="1/minute burst=1", over_limit="queue")], who="test", why="")
    task = declare(taskguard_app, noting(ran), name="shop.charge", retry=ONCE, limited=True)
    other = declare(taskguard_app, noting(ran), name="mail.send", retry=ONCE, limited=True)
    for n in range(3):
        task.delay(n)
    other.delay("mail")
    reliable.drain()
    assert ran == [0, "mail"]
    assert len(reliable.waiting) == 2
    reliable.drain(until="idle")
    assert ran == [0, "mail", 1, 2]


def test_a_limited_task_says_whose_it_is(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], rules: MemoryRules
) -> None:
    """By its arguments, or a header of its message; the tier too."""
    rules.put(
        [
            Rule(id="free", client="*", tier="free", limits="1/minute burst=1", over_limit="queue"),
            Rule(id="premium", client="*", tier="premium", limits="100/minute", over_limit="queue"),
        ],
        who="test",
        why="",
    )

    def body(order: dict[str, Any], plan: str) -> None:
        ran.append(order["id"])

    whose = {"client": "{order[tenant]}", "tier": lambda order, plan: plan}
    task = declare(taskguard_app, body, name="shop.charge", retry=ONCE, limited=whose)
    for id, (tenant, plan) in enumerate(
        [("acme", "free"), ("acme", "free"), ("bolt", "free"), *[("corp", "premium")] * 2]
    ):
        task.delay({"id": id, "tenant": tenant}, plan)
    tenants = declare(
        taskguard_app, noting(ran), name="shop.report", retry=ONCE,
        limited={"client": "header:x-tenant", "tier": lambda n: "free"},
    )  # fmt: skip
    for n, tenant in enumerate(("dune", "dune", "echo")):
        tenants.apply_async((f"report {n}",), headers={"x-tenant": tenant})
    reliable.drain()
    assert ran == [0, 2, 3, 4, "report 0", "report 2"]
    assert len(reliable.waiting) == 2


@pytest.mark.parametrize("limited", ["yes", {"klient": "{n}"}, {"client": "{tenant}"}, ["client"]])
def test_a_task_that_does_not_say_whose_it_is_is_refused_where_it_is_declared(
    taskguard_app: Celery, limited: Any
) -> None:
    """A name that is no argument too: nobody would be limited."""

    def body(n: int) -> None:
        """Nothing."""

    with pytest.raises(ConfigurationError, match=r"shop\.charge"):
        declare(taskguard_app, body, name="shop.charge", limited=limited).key_for((1,), {}, "1")


def test_a_limited_task_runs_where_nobody_has_made_a_rule(reliable: Reliable, taskguard_app: Celery) -> None:
    """In the tests of users too, which go by no store's rules."""
    task = declare(taskguard_app, noting([]), limited=True)
    sent = task.delay(1)
    reliable.drain()
    assert sent.state == "SUCCESS"


def test_the_rules_and_a_downstream_are_each_asked_once(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], rules: MemoryRules
) -> None:
    """Who was let in by the one and refused by the other keeps its place with the first; who was refused by the rules
    has no place with the downstream."""
    rules.put([Rule(id="shop", limits="2/minute burst=2", over_limit="queue")], who="test", why="")
    bank = Downstream("bank", rate=TokenBucket(1, per=60, burst=1))
    task = declare(taskguard_app, noting(ran), name="shop.charge", retry=ONCE, limited={}, downstream=bank)
    began = reliable.clock()
    for n in range(3):
        task.delay(n)
    reliable.drain()
    assert ran == [0]
    resting = list(taskguard_app.taskguard.store.scan(State.PENDING))
    places = [sorted(headers.bookings(Envelope.from_wire(record.wire or b""))) for record in resting]
    waits = sorted(zip(places, (round((record.due_at or 0) - began) for record in resting), strict=True))
    assert waits == [(["bank", "shop.charge (rules)"], 60), (["shop.charge (rules)"], 30)]
    reliable.drain(until="idle")
    assert ran == [0, 1, 2]
    assert reliable.clock() - began == pytest.approx(120, abs=2)
