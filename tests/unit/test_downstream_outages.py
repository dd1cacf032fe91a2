"""The permit store is down: calls go on or are refused, as declared; nobody waits twice, and it is told once."""

from __future__ import annotations

import time
from typing import Any

import pytest

from taskguard.errors import CircuitOpenError, Refused
from taskguard.policies import CircuitBreaker, FixedWindow, TokenBucket
from tests.unit.permithouse import PermitHouse


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


def options() -> dict[str, Any]:
    return {"rate": TokenBucket(100), "concurrency": 5, "circuit": CircuitBreaker()}


def test_calls_are_let_through_and_counted(permits: PermitHouse) -> None:
    """Trap 41, the default: limits do not stop the work."""
    bank = permits.downstream(**options())
    permits.store.down = True
    assert [bank.call(lambda: 5) for _ in range(10)] == [5] * 10
    assert bank.stats().store_down_total == 10
    assert bank.stats().bulkhead_active == 0


def test_calls_are_refused_where_that_is_declared(permits: PermitHouse) -> None:
    """Trap 41: with when to come back."""
    bank = permits.downstream(**options(), on_store_down="refuse")
    permits.store.down = True
    with pytest.raises(Refused, match="on_store_down is 'refuse'") as caught:
        bank.call(lambda: None)
    assert (caught.value.retry_after or 0) >= 0.1


def test_an_outage_costs_one_question_and_one_event(permits: PermitHouse) -> None:
    """Traps 41 and 42: until the pause is over the store is not asked, and what happened is told once."""
    bank = permits.downstream(**options())
    bank.call(lambda: None)
    permits.store.asked.clear()
    permits.store.down = True
    for _ in range(100):
        bank.call(lambda: None)
    assert permits.store.asked["admit"] == 1
    assert len(permits.told("permits_down")) == 1


def test_recovery_is_noticed_without_losing_a_call(permits: PermitHouse) -> None:
    """Trap 43: the first call after the pause finds out, is limited again, and says so."""
    bank = permits.downstream(rate=FixedWindow(1, per=60))
    permits.store.down = True
    bank.call(lambda: None)
    permits.store.down = False
    permits.clock.advance(2.5)
    bank.call(lambda: None)
    assert len(permits.told("permits_back")) == 1
    with pytest.raises(Refused):
        bank.call(lambda: None)


def test_a_call_of_an_outage_is_quick(permits: PermitHouse) -> None:
    """No sleep and no round trip is left in it: a thousand of them well under a second."""
    bank = permits.downstream(**options())
    permits.store.down = True
    bank.call(lambda: None)
    began = time.perf_counter()
    for _ in range(1000):
        bank.call(lambda: None)
    assert time.perf_counter() - began < 1.0


def test_failures_of_an_outage_are_told_when_it_is_over(permits: PermitHouse) -> None:
    """What could not be reported within the window counts then."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=3))
    bank.call(lambda: None)
    permits.store.down = True
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            bank.call(lambda: 1 / 0)
    permits.store.down = False
    permits.clock.advance(2.5)
    assert bank.circuit is not None
    bank.circuit.tend()
    with pytest.raises(CircuitOpenError):
        bank.call(lambda: None)


def test_failures_older_than_the_window_are_not_told(permits: PermitHouse) -> None:
    """A long outage does not open the circuits when it ends."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=3, window_size=10))
    bank.call(lambda: None)
    permits.store.down = True
    assert bank.circuit is not None
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            bank.call(lambda: 1 / 0)
        permits.clock.advance(10)
        bank.circuit.tend()
    permits.store.down = False
    permits.clock.advance(2.5)
    bank.circuit.tend()
    assert permits.store.circuit("bank").failures == 0


def test_an_open_circuit_stays_open_without_its_store_and_then_lets_through(permits: PermitHouse) -> None:
    """What is known is kept; when the wait is over and nobody can give a probe, the declared policy decides."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=1, wait_in_open=30))
    with pytest.raises(ZeroDivisionError):
        bank.call(lambda: 1 / 0)
    permits.store.down = True
    permits.clock.advance(29)
    with pytest.raises(CircuitOpenError):
        bank.call(lambda: None)
    permits.clock.advance(2)
    assert bank.call(lambda: 5) == 5


def test_a_place_that_could_not_be_given_back_is_later(permits: PermitHouse) -> None:
    """A release that met the outage is sent again."""
    bank = permits.downstream(concurrency=1)
    other = permits.downstream(desk=permits.another_desk(), concurrency=1)
    with bank.permit(covers=False):
        permits.store.down = True
    permits.desk.flush()
    permits.store.down = False
    permits.clock.advance(2.5)
    permits.desk.flush()
    assert other.call(lambda: 5) == 5


def test_a_slot_is_not_lost_by_a_renewal_that_failed(permits: PermitHouse) -> None:
    """An outage shorter than the lease costs no place."""
    bank = permits.downstream(concurrency=1)
    with bank.permit(covers=False):
        permits.store.down = True
        permits.clock.advance(15)
        permits.desk._renewals[30.0].tend()
        permits.store.down = False
        permits.clock.advance(3)
        permits.desk._renewals[30.0].tend()
        permits.clock.advance(25)
        permits.desk._renewals[30.0].tend()
    assert permits.told("slot_lost") == []
