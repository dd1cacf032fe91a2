"""A process's view of the fleet's circuit: what it costs closed, what it knows open, and whom it lets probe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from taskguard.errors import CircuitOpenError
from taskguard.permits import CircuitView
from taskguard.policies import CircuitBreaker, CircuitChange
from tests.unit.permithouse import PATIENCE, PermitHouse, threads

BREAKER = CircuitBreaker(minimum_calls=4, failure_rate_threshold=0.5, wait_in_open=30, max_wait_in_open=600)


class Unwell(Exception):
    """What the downstream raises."""


def fail(*_: Any) -> None:
    raise Unwell("500")


def trip(bank: Any, times: int = 4) -> None:
    for _ in range(times):
        with pytest.raises(Unwell):
            bank.call(fail)


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


@pytest.fixture
def _hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_closed_circuit_asks_the_store_nothing(permits: PermitHouse) -> None:
    """Zero commands a call, by the decorator and by call (P8)."""
    bank = permits.downstream(circuit=BREAKER)
    charge = bank(lambda amount: amount)
    assert charge(1) == 1
    assert bank.circuit is not None
    bank.circuit.due_at = float("inf")
    permits.store.asked.clear()
    for amount in range(100):
        assert charge(amount) == amount
        assert bank.call(lambda: 7) == 7
    asked = {name: many for name, many in permits.store.asked.items() if many}
    assert asked == {}


def test_an_open_circuit_refuses_without_the_store_and_says_when_to_come_back(permits: PermitHouse) -> None:
    """Trap 38: the refusal is local, an exception of its own, and carries retry_after."""
    bank = permits.downstream(circuit=BREAKER)
    trip(bank)
    permits.store.asked.clear()
    refusals = []
    for _ in range(3):
        with pytest.raises(CircuitOpenError) as caught:
            bank.call(fail)
        refusals.append(caught.value)
    assert permits.store.asked["admit"] == 0
    assert {round(refused.retry_after or 0) for refused in refusals} == {30}
    assert refusals[0].downstream == "bank"
    assert len({id(refused) for refused in refusals}) == 3
    assert bank.stats().circuit_breaker_rejected_total == 3


def test_failures_of_processes_that_each_see_few_trip_together(permits: PermitHouse) -> None:
    """Trap 35: the window is the fleet's; a process with nothing but successes does not hide another's failures."""
    one, other = permits.downstream(circuit=BREAKER), permits.downstream(desk=permits.another_desk(), circuit=BREAKER)
    for _ in range(2):
        with pytest.raises(Unwell):
            one.call(fail)
        with pytest.raises(Unwell):
            other.call(fail)
    with pytest.raises(CircuitOpenError):
        other.call(fail)


def test_successes_are_told_with_the_next_failure(permits: PermitHouse) -> None:
    """What was counted locally weighs against a failure at once, so that one failure of many calls trips nothing."""
    bank = permits.downstream(circuit=BREAKER)
    for _ in range(9):
        bank.call(lambda: None)
    for _ in range(4):
        with pytest.raises(Unwell):
            bank.call(fail)
    view = permits.store.circuit("bank")
    assert (view.state, view.calls, view.failures) == ("closed", 13, 4)


def test_successes_are_told_by_the_tending_thread_in_time(permits: PermitHouse) -> None:
    """Without any failure the fleet's window still learns how many calls there were."""
    bank = permits.downstream(circuit=BREAKER)
    bank.call(lambda: None)
    assert bank.circuit is not None
    bank.circuit.tend()
    assert permits.store.circuit("bank").calls == 1
    bank.circuit.tend()
    assert permits.store.circuit("bank").calls == 1


def test_another_process_sees_the_trip_by_push(permits: PermitHouse) -> None:
    """Trap 39: who made no call since is told."""
    heard = threading.Event()
    changes: list[CircuitChange] = []

    def on_change(change: CircuitChange) -> None:
        changes.append(change)
        heard.set()

    other = permits.downstream(desk=permits.another_desk(), circuit=replace(BREAKER, on_change=on_change))
    other.call(lambda: None)
    trip(permits.downstream(circuit=BREAKER))
    assert heard.wait(PATIENCE)
    assert [(change.name, change.before, change.after) for change in changes] == [("bank", "closed", "open")]
    with pytest.raises(CircuitOpenError):
        other.call(lambda: None)


def test_without_push_the_trip_is_seen_with_the_next_report(permits: PermitHouse) -> None:
    """Trap 39: with the listener cut, the answer to the tending thread's report says so."""
    permits.store.silent = True
    other = permits.downstream(desk=permits.another_desk(), circuit=BREAKER)
    other.call(lambda: None)
    trip(permits.downstream(circuit=BREAKER))
    assert other.circuit is not None
    other.circuit.tend()
    assert other.circuit.state == "open"


@pytest.mark.usefixtures("_hasty")
def test_exactly_one_probe_goes_across_threads_and_processes(permits: PermitHouse) -> None:
    """Trap 33: of sixteen callers in two processes one is let through, and closes the circuit."""
    heard = threading.Event()
    told = replace(BREAKER, on_change=lambda _: heard.set())
    banks = [permits.downstream(circuit=BREAKER), permits.downstream(desk=permits.another_desk(), circuit=told)]
    banks[1].call(lambda: None)
    trip(banks[0])
    assert heard.wait(PATIENCE)
    permits.clock.advance(30.001)
    hold, inside = threading.Event(), threading.Event()
    calls: list[int] = []

    def probe(index: int) -> None:
        calls.append(index)
        inside.set()
        hold.wait(PATIENCE)

    def work(index: int) -> Any:
        if index == 16:
            assert inside.wait(PATIENCE)
            done.wait(PATIENCE)
            hold.set()
            return None
        try:
            return banks[index % 2].call(probe, index)
        finally:
            with lock:
                left.append(index)
                if len(left) >= 15:
                    done.set()

    lock, left, done = threading.Lock(), list[int](), threading.Event()
    found = threads(17, work)
    assert len(calls) == 1
    assert sum(isinstance(each, CircuitOpenError) for each in found) == 15
    assert permits.store.circuit("bank").state == "closed"


def test_a_probe_that_dies_gives_way_after_its_lease(permits: PermitHouse) -> None:
    """Trap 33: the place of a killed process's probe is free when its lease ends."""
    bank = permits.downstream(circuit=BREAKER)
    trip(bank)
    permits.clock.advance(30.001)
    dead = permits.downstream(desk=permits.another_desk(), circuit=BREAKER)
    dead.permit(covers=False).__enter__()
    with pytest.raises(CircuitOpenError):
        bank.call(lambda: None)
    permits.clock.advance(30.001)
    assert bank.call(lambda: 5) == 5


def test_a_probe_cut_short_gives_its_place_back(permits: PermitHouse) -> None:
    """Trap 36: a probe that was ended from outside is neither success nor failure, and the next one goes at once."""
    bank = permits.downstream(circuit=BREAKER)
    trip(bank)
    permits.clock.advance(30.001)

    def leave() -> None:
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        bank.call(leave)
    assert permits.store.circuit("bank").state == "half_open"
    assert bank.call(lambda: 5) == 5
    assert permits.store.circuit("bank").state == "closed"


def test_late_outcomes_of_before_the_trip_count_no_more(permits: PermitHouse) -> None:
    """Trap 34: neither does a late success close the circuit, nor a late failure open the next one."""
    bank = permits.downstream(circuit=BREAKER)
    well, unwell = bank.permit(covers=False), bank.permit(covers=False)
    well.__enter__()
    unwell.__enter__()
    other = permits.downstream(desk=permits.another_desk(), circuit=BREAKER)
    trip(other)
    assert bank.circuit is not None
    bank.circuit.tend()
    well.__exit__(None, None, None)
    bank.circuit.tend()
    assert permits.store.circuit("bank").state == "open"
    permits.clock.advance(30.001)
    other.call(lambda: None)
    before = permits.store.circuit("bank")
    permits.store.asked.clear()
    unwell.__exit__(Unwell, Unwell("late"), None)
    assert permits.store.asked["report"] == 0
    assert permits.store.circuit("bank") == before


@pytest.mark.usefixtures("_hasty")
def test_no_count_is_lost_between_threads(permits: PermitHouse) -> None:
    """Trap 27: the lock-free counts are exact while another thread tells them."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=100_000))
    charge = bank(lambda: None)
    charge()
    assert bank.circuit is not None
    circuit = bank.circuit

    def work(index: int) -> None:
        for _ in range(300):
            if index == 0:
                circuit.tend()
            else:
                charge()

    assert threads(8, work) == [None] * 8
    circuit.tend()
    assert permits.store.circuit("bank").calls == 7 * 300 + 1
    assert bank.stats().circuit_breaker_success_total == 7 * 300 + 1


def test_slow_calls_open_the_circuit(permits: PermitHouse) -> None:
    """Calls that answer too late are told, though they raise nothing."""
    slow = CircuitBreaker(
        minimum_calls=3, slow_call_rate_threshold=0.9, slow_call_duration=1e-9, failure_rate_threshold=1
    )
    bank = permits.downstream(circuit=slow)
    charge = bank(lambda: None)
    for _ in range(3):
        charge()
    assert bank.circuit is not None
    bank.circuit.tend()
    with pytest.raises(CircuitOpenError):
        charge()


def test_an_emptied_store_is_believed(permits: PermitHouse) -> None:
    """Generations begin anew after a store lost all; a process must not wait for them to catch up."""
    bank = permits.downstream(circuit=BREAKER)
    bank.call(lambda: None)
    assert bank.circuit is not None
    bank.circuit.apply(CircuitView(name="bank", generation=7, state="open", until=permits.clock() + 5))
    permits.clock.advance(6)
    assert bank.call(lambda: 5) == 5
    assert bank.circuit.view.generation == 0


def test_news_that_is_older_than_what_is_known_changes_nothing(permits: PermitHouse) -> None:
    """A message overtaken by another, and an answer to a question from before, are not news."""
    bank = permits.downstream(circuit=BREAKER)
    bank.call(lambda: None)
    assert bank.circuit is not None
    asked_at = permits.clock()
    bank.circuit.apply(CircuitView(name="bank", generation=7, state="open", until=permits.clock() + 5))
    bank.circuit.apply(CircuitView(name="bank", generation=6))
    bank.circuit.apply(CircuitView(name="bank", generation=6), asked_at=asked_at)
    assert bank.circuit.state == "open"


def test_a_failing_callback_does_not_fail_the_call(permits: PermitHouse, caplog: pytest.LogCaptureFixture) -> None:
    """on_change is told; what it raises is logged."""

    def broken(change: CircuitChange) -> None:
        raise RuntimeError("in on_change")

    trip(permits.downstream(circuit=replace(BREAKER, on_change=broken)))
    assert "on_change of circuit bank failed" in caplog.text
    assert [event.detail.split(":")[0] for event in permits.told("circuit_changed")] == ["closed to open"]
