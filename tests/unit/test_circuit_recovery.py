"""A circuit opens although it is asked to wait, and closes although a report, a call or a probe was lost or slow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from taskguard.celery.admission import _wait_in_open
from taskguard.celery.pausing import _still
from taskguard.downstream.circuit import Circuit
from taskguard.downstream.service import Downstream
from taskguard.downstream.spans import Span
from taskguard.errors import CircuitOpenError, RateLimitedError, Refused
from taskguard.permits import Outcomes, ProbeOutcome
from taskguard.policies import CircuitBreaker
from tests.unit.permithouse import PATIENCE, PermitHouse

BREAKER = CircuitBreaker(minimum_calls=4, wait_in_open=30, probe_lease=30)


class Unwell(Exception):
    """503 with Retry-After: 1."""

    response = SimpleNamespace(status_code=503, headers={"Retry-After": "1"})


def unwell(*_: Any) -> None:
    raise Unwell


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def trip(bank: Downstream) -> Circuit:
    """Open the circuit, which nothing tends by itself any more."""
    for _ in range(4):
        with pytest.raises(ZeroDivisionError):
            bank.call(fail)
    assert bank.circuit is not None
    bank.circuit.due_at = float("inf")
    return bank.circuit


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


@pytest.mark.parametrize("decorated", [False, True])
def test_a_retry_after_does_not_keep_the_circuit_closed(permits: PermitHouse, decorated: bool) -> None:
    """Four answers, four pauses, and then it is open, by its own wait."""
    bank = permits.downstream(circuit=BREAKER)
    call: Callable[[], Any] = bank(unwell) if decorated else lambda: bank.call(unwell)
    for n in range(4):
        with pytest.raises(Unwell):
            call()
        if n < 3:
            with pytest.raises(RateLimitedError):
                call()
            permits.clock.advance(1.001)
    with pytest.raises(CircuitOpenError) as caught:
        call()
    assert caught.value.retry_after == pytest.approx(30, abs=0.1)
    assert len(permits.told("downstream_paused")) == 3


def test_failures_under_way_at_a_pause_are_told(permits: PermitHouse) -> None:
    """By processes that have learned of the pause meanwhile."""
    one, other = (permits.downstream(desk=permits.another_desk(), circuit=BREAKER) for _ in range(2))
    under_way = [other.permit(covers=False) for _ in range(3)]
    for each in under_way:
        each.__enter__()
    with pytest.raises(Unwell):
        one.call(unwell)
    assert other.circuit is not None
    other.circuit.apply(permits.store.circuit("bank"))
    assert other.circuit.state == "forced_open"
    for each in under_way:
        each.__exit__(Unwell, Unwell(), None)
    assert permits.store.circuit("bank").state == "open"


def test_a_probe_that_outlasts_its_lease_keeps_it_and_closes(permits: PermitHouse) -> None:
    """Its lease is renewed while the call lasts, so nobody else probes; its end counts."""
    bank = permits.downstream(circuit=BREAKER)
    circuit = trip(bank)
    permits.clock.advance(30.001)
    probe = bank.permit(covers=False)
    probe.__enter__()
    circuit.due_at = float("inf")
    other = permits.downstream(desk=permits.another_desk(), circuit=BREAKER)
    for _ in range(5):
        permits.clock.advance(20)
        circuit.tend()
        with pytest.raises(CircuitOpenError):
            other.call(lambda: None)
    probe.__exit__(None, None, None)
    assert permits.store.circuit("bank").state == "closed"


def test_a_probe_that_hangs_for_good_gives_way(permits: PermitHouse) -> None:
    """After ten leases; its end would count even then."""
    bank = permits.downstream(circuit=BREAKER)
    circuit = trip(bank)
    permits.clock.advance(30.001)
    probe = bank.permit(covers=False)
    probe.__enter__()
    circuit.due_at = float("inf")
    for _ in range(17):
        permits.clock.advance(20)
        circuit.tend()
    other = permits.downstream(desk=permits.another_desk(), circuit=BREAKER)
    rival = other.permit(covers=False)
    rival.__enter__()
    probe.__exit__(None, None, None)
    assert permits.store.circuit("bank").state == "closed"


def test_a_renewal_makes_no_probe_of_a_call_that_is_none_any_more(permits: PermitHouse) -> None:
    """Somebody else's probe has failed: the next turn is not taken by who only kept its own."""
    policy = CircuitBreaker(minimum_calls=4, wait_in_open=30, probe_lease=30, probes_in_half_open=2)
    bank = permits.downstream(circuit=policy)
    circuit = trip(bank)
    permits.clock.advance(30.001)
    bank.permit(covers=False).__enter__()
    circuit.due_at = float("inf")
    other = permits.downstream(desk=permits.another_desk(), circuit=policy)
    with pytest.raises(ZeroDivisionError):
        other.call(fail)
    permits.clock.advance(61)
    circuit.tend()
    assert permits.store.circuit("bank").state == "open"


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_an_end_of_a_probe_that_was_not_heard_is_told_again(permits: PermitHouse, outcome: str) -> None:
    """One lost report does not hold up the fleet for a lease."""
    bank = permits.downstream(circuit=BREAKER)
    circuit = trip(bank)
    permits.clock.advance(30.001)

    def probe() -> None:
        permits.store.down = True
        if outcome == "failure":
            fail()

    if outcome == "failure":
        with pytest.raises(ZeroDivisionError):
            bank.call(probe)
    else:
        bank.call(probe)
    circuit.due_at = float("inf")
    permits.store.down = False
    assert permits.store.circuit("bank").state == "half_open"
    permits.clock.advance(20)
    circuit.tend()
    assert permits.store.circuit("bank").state == ("closed" if outcome == "success" else "open")


def test_a_cancelled_admission_gives_its_turn_to_probe_back(
    permits: PermitHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is told by another thread than the loop's."""
    permits.desk.in_process = False
    bank = permits.downstream(circuit=BREAKER)
    circuit = trip(bank)
    permits.clock.advance(30.001)
    inside, go, told = threading.Event(), threading.Event(), threading.Event()
    by: list[int] = []
    admit, report = permits.store.admit, permits.store.report

    def slowly(ask: Any) -> Any:
        answer = admit(ask)
        inside.set()
        go.wait(PATIENCE)
        return answer

    def noted(*args: Any, **options: Any) -> Any:
        by.append(threading.get_ident())
        view = report(*args, **options)
        told.set()
        return view

    monkeypatch.setattr(permits.store, "admit", slowly)
    monkeypatch.setattr(permits.store, "report", noted)

    async def probe() -> None:
        return None

    async def cancelled() -> None:
        task = asyncio.ensure_future(bank(probe)())
        await asyncio.to_thread(inside.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    asyncio.run(cancelled())
    assert told.wait(PATIENCE)
    assert threading.get_ident() not in by
    circuit.due_at = float("inf")
    assert permits.store.circuit("bank").state == "half_open"
    assert bank.call(lambda: 5) == 5


def test_who_meets_a_probe_is_told_to_come_back_soon(permits: PermitHouse) -> None:
    """Not when the probe's lease ends: that is how long it may take at most."""
    bank = permits.downstream(circuit=BREAKER)
    trip(bank)
    permits.clock.advance(30.001)
    bank.permit(covers=False).__enter__()
    with pytest.raises(Refused) as caught:
        permits.downstream(desk=permits.another_desk(), circuit=BREAKER).call(len, "")
    assert caught.value.retry_after == 1.0


def test_a_failure_is_never_told_without_its_call(permits: PermitHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the tending thread tells what was counted: here between a call's two counts."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=100))
    bank.call(lambda: None)
    circuit = bank.circuit
    assert circuit is not None
    circuit.due_at = float("inf")
    circuit.tend()
    span = circuit.span
    assert isinstance(span, Span)
    for tally in (span.calls, span.failures):
        add = tally.add

        def and_tend(add: Any = add) -> int:
            found: int = add()
            circuit.tend()
            return found

        monkeypatch.setattr(tally, "add", and_tend)
    with pytest.raises(ZeroDivisionError):
        bank.call(fail)
    view = permits.store.circuit("bank")
    assert (view.calls, view.failures) == (2, 1)


def test_a_queue_paused_for_a_circuit_is_resumed_when_it_is_closed(permits: PermitHouse) -> None:
    """Once, and neither while it is open, nor what an operator paused, nor for a circuit of another store."""
    store: Any = permits.store
    runtime: Any = SimpleNamespace(permits=store)
    trip(permits.downstream(circuit=BREAKER))
    pauses = {"a": "circuit bank", "b": "ann", "c": "circuit elsewhere"}
    for queue, who in pauses.items():
        store.pause(queue, until=permits.clock() + 500, who=who, why="")
    assert _still(runtime, store.paused()).keys() == pauses.keys()
    permits.clock.advance(30.001)
    bank = permits.downstream(circuit=BREAKER)
    bank.permit(covers=False).__enter__()
    assert _still(runtime, store.paused()).keys() == pauses.keys()
    view = store.force("bank", "closed", until=None, who="ann", why="")
    store.report("bank", BREAKER, Outcomes(view.generation), ProbeOutcome("x", "ignored"))
    assert _still(runtime, store.paused()).keys() == {"b", "c"}
    assert store.paused().keys() == {"b", "c"}


def test_a_queue_is_not_paused_for_a_probes_lease(permits: PermitHouse) -> None:
    """Nor where the circuit does not say how long: its probes will have ended soon. Open, its own wait holds."""
    bank = permits.downstream(circuit=BREAKER)
    circuit = trip(bank)
    refused = [CircuitOpenError("", retry_after=wait, downstream="bank", limit="bank") for wait in (None, 29.0, 0.2)]
    assert [_wait_in_open(each, BREAKER, circuit) for each in refused] == [30.0, 29.0, 0.2]
    permits.clock.advance(30.001)
    bank.permit(covers=False).__enter__()
    circuit.due_at = float("inf")
    assert circuit.state == "half_open"
    assert [_wait_in_open(each, BREAKER, circuit) for each in refused] == [1.0, 1.0, 0.2]
