"""A task whose downstream's circuit is open, whose time is up, or whose clock is wrong."""

# ruff: noqa: F811
from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
from celery import Celery

from taskguard.celery.admission import SPARED
from taskguard.downstream import timeouts
from taskguard.downstream.desk import Desk, use
from taskguard.downstream.service import Downstream
from taskguard.errors import CircuitOpenError
from taskguard.policies import CircuitBreaker, Concurrency, Default, Fallback, LeakyBucket, Timeout
from taskguard.record import Reason
from taskguard.stores.memory import MemoryPermits
from taskguard.testing import Reliable
from tests.unit.downstreamhouse import Down, Line, circuit, joined, ran, taskguard_app  # noqa: F401
from tests.unit.rehearsal import declare

# -- circuits ---------------------------------------------------------------------------------------------------------


def trip(line: Line) -> None:
    """Two failures outside of any task."""
    line.down = True
    for n in (-1, -2):
        with pytest.raises(Down):
            line.downstream.using(cost=0.001).call(_raise, n)
    assert line.downstream.circuit is not None
    assert line.downstream.circuit.state == "open"


def _raise(n: int) -> None:
    raise Down(n)


def test_an_open_circuit_parks_and_drains_slowly(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], circuit: dict[str, Any]
) -> None:
    """The first is the probe; the others follow at the declared rate, which grows over the slow start."""
    line = Line(taskguard_app, ran, rate=LeakyBucket(2), circuit=CircuitBreaker(**circuit))
    trip(line)
    began = reliable.clock()
    line.send(*range(8))
    reliable.drain()
    places = [(message.due_at or 0) - began for message in reliable.waiting]
    assert places[0] == pytest.approx(10.0, abs=0.01)
    gaps = [after - before for before, after in pairwise(places)]
    assert gaps[0] == pytest.approx(2.0, abs=0.01)
    assert gaps == sorted(gaps, reverse=True) or min(gaps) >= 0.49
    line.down = False
    reliable.drain(until="idle")
    assert ran == list(range(8))
    assert not reliable.dead_letters


def test_a_probe_that_fails_is_charged_with_nothing(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], circuit: dict[str, Any]
) -> None:
    """It was sent to find out. It comes back like those that waited for it."""
    line = Line(taskguard_app, ran, rate=LeakyBucket(2), circuit=CircuitBreaker(**circuit))
    trip(line)
    line.send(0, 1, 2)
    reliable.drain(until=31)
    assert ran, "it was probed"
    assert line.downstream.circuit.state == "open"
    line.down = False
    reliable.drain(until="idle")
    assert sorted(set(ran)) == [0, 1, 2]
    assert not reliable.dead_letters
    assert [event.name for event in reliable.events].count("completed") == 3


def test_a_message_that_always_fails_is_not_spared_for_ever(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], circuit: dict[str, Any]
) -> None:
    """Or it alone would keep the circuit open."""
    line = Line(taskguard_app, ran, circuit=CircuitBreaker(**circuit, max_wait_in_open=20))
    trip(line)
    line.send(7)
    reliable.drain(until="idle")
    assert ran == [7] * (SPARED + 1)
    (letter,) = reliable.dead_letters
    assert letter.failure.error_type == "Down"


def test_an_open_circuit_may_end_the_task(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], circuit: dict[str, Any]
) -> None:
    """``on_open="dead_letter"``: with a reason of its own."""
    line = Line(taskguard_app, ran, circuit=CircuitBreaker(**circuit, on_open="dead_letter"))
    trip(line)
    (result,) = line.send(0)
    reliable.drain()
    (letter,) = reliable.dead_letters
    assert letter.failure.reason is Reason.CIRCUIT_OPEN
    with pytest.raises(CircuitOpenError):
        result.get()


def test_an_open_circuit_may_be_answered_by_the_fallback(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], circuit: dict[str, Any]
) -> None:
    """``on_open="fallback"``: the task's result is the fallback's value, and it is completed."""
    policy = CircuitBreaker(**circuit, on_open="fallback")
    line = Line(taskguard_app, ran, circuit=policy, fallback=Fallback(Default("later")))
    line.down = True
    for n in (-1, -2):
        assert line.downstream.call(_raise, n) == "later"
    (result,) = line.send(0)
    reliable.drain()
    assert (result.get(), ran) == ("later", [])
    assert [event.name for event in reliable.events if event.task] == ["completed"]


def test_an_open_circuit_may_pause_the_queue(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], circuit: dict[str, Any]
) -> None:
    """Until the first probe; a longer pause, or an operator's, stays as it is."""
    line = Line(taskguard_app, ran, circuit=CircuitBreaker(**circuit, on_open="pause_queue"))
    permits = taskguard_app.taskguard.permits
    trip(line)
    line.send(0)
    reliable.drain()
    until, who, why = permits.paused()["celery"]
    assert until == pytest.approx(reliable.clock() + 10, abs=0.01)
    assert who == "circuit line"
    assert "open" in why
    permits.pause("celery", until=None, who="ann", why="mine")
    line.send(1)
    reliable.drain()
    assert permits.paused()["celery"] == (None, "ann", "mine")


def test_a_circuit_that_is_open_for_good_says_who_can_close_it(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], circuit: dict[str, Any]
) -> None:
    """The task waits, so nobody is told that waiting is of no use."""
    line = Line(taskguard_app, ran, circuit=CircuitBreaker(**circuit))
    store = taskguard_app.taskguard.permits
    store.force("line", "forced_open", until=None, who="ann", why="stop")
    line.send(0)
    reliable.drain()
    (deferred,) = [event for event in reliable.events if event.name == "deferred"]
    assert "forced open by ann: stop; it stays so until an operator closes it" in deferred.detail
    store.force("line", "closed", until=None, who="ann", why="go")
    reliable.drain(until="idle")
    assert ran == [0]


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_task_runs_under_its_downstreams_timeout(reliable: Reliable, taskguard_app: Celery) -> None:
    """Its body has the total as its budget, or what the deadline leaves; one that was late is a failure, and done."""
    bank = Downstream("bank", timeout=Timeout(total=0.2), circuit=CircuitBreaker())
    left: list[float | None] = []

    def work(nap: float) -> None:
        left.append(timeouts.remaining())
        time.sleep(nap)

    task = declare(taskguard_app, work, name="work", downstream=bank)
    task.delay(0)
    task.apply_async((0,), deadline=0.1)
    task.delay(0.25)
    reliable.drain(until="idle")
    first, bounded, _ = left
    assert 0.1 < (first or 0) <= 0.201  # of an epoch's instant, in doubles
    assert 0 < (bounded or 0) <= 0.101
    assert [event.name for event in reliable.events].count("completed") == 3
    stats = bank.stats()
    assert (stats.circuit_breaker_failures_total, stats.circuit_breaker_success_total) == (1, 2)
    assert stats.request_timeout_total == 1
    assert timeouts.remaining() is None


@pytest.mark.parametrize(
    ("kind", "off"), [("rate", 5.0), ("rate", -5.0), ("open", 5.0), ("open", -5.0), ("place", 5.0)]
)
def test_a_refused_task_is_due_by_the_stores_clock(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], kind: str, off: float
) -> None:
    """The store compares with its own: a host that is behind would ask again and again, one ahead rest for longer."""

    def there() -> float:
        return reliable.clock() + off

    store = MemoryPermits(there)
    use(lambda: Desk(store, clock=reliable.clock))
    options: dict[str, dict[str, Any]] = {
        "rate": {"rate": LeakyBucket(1, per=10)},
        "place": {"concurrency": Concurrency(1, local=True)},
        "open": {"circuit": CircuitBreaker(wait_in_open=10, slow_start=0)},
    }
    line = Line(taskguard_app, ran, **options[kind])
    if kind == "open":
        store.force("line", "forced_open", until=there() + 10, who="ann", why="a test")
    elif kind == "rate":
        line.send(0)
        reliable.drain()
    with line.downstream.permit(covers=False) if kind == "place" else nullcontext():
        began = there()
        line.send(1)
        reliable.drain()
    (message,) = reliable.waiting
    wait = (message.due_at or 0.0) - began
    assert 0 < wait < 0.1 if kind == "place" else 9.9 < wait < 12
