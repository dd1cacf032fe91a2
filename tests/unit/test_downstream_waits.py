"""Waiting for a permit: no longer than declared, never past the budget, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from taskguard.downstream import timeouts
from taskguard.downstream.desk import Desk
from taskguard.downstream.service import Downstream, booking
from taskguard.downstream.slots import LocalSlots
from taskguard.errors import BulkheadFullError, CircuitOpenError, DownstreamTimeout, RateLimitedError
from taskguard.policies import CircuitBreaker, Concurrency, TokenBucket
from taskguard.stores.memory import MemoryPermits
from tests.unit.permithouse import PATIENCE, PermitHouse, threads


def real(name: str = "bank", **options: Any) -> Downstream:
    """A downstream whose store and desk go by the real clock."""
    return Downstream(name, store=Desk(MemoryPermits()), **options)


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


def test_waiters_of_a_rate_are_served_at_its_pace() -> None:
    """Each has a slot of its own: two questions and one wait a call, nobody twice, nobody forgotten."""
    bank = real(rate=TokenBucket(100, per=1, burst=1), max_wait=PATIENCE)
    began = time.monotonic()
    assert threads(10, lambda index: bank.call(lambda: index)) == list(range(10))
    assert time.monotonic() - began >= 0.089


def test_who_would_wait_too_long_is_refused_at_once() -> None:
    """With when to come back, and without having waited."""
    bank = real(rate=TokenBucket(1, per=60), max_wait=0.5)
    bank.call(lambda: None)
    began = time.monotonic()
    with pytest.raises(RateLimitedError) as caught:
        bank.call(lambda: None)
    assert time.monotonic() - began < 0.5
    assert (caught.value.retry_after or 0) > 50
    assert caught.value.slot_at is None


def test_nobody_waits_past_the_budget() -> None:
    """Ten seconds may be waited, a tenth is left."""
    for name, options in (
        ("rate", {"rate": TokenBucket(1, per=5)}),
        ("fleet", {"concurrency": Concurrency(1, max_wait=PATIENCE)}),
        ("local", {"concurrency": Concurrency(1, local=True, max_wait=PATIENCE)}),
    ):
        bank = real(name, max_wait=PATIENCE, **options)
        with bank.permit(covers=False), timeouts.budget(0.1):
            began = time.monotonic()
            with pytest.raises((RateLimitedError, BulkheadFullError)):
                bank.call(lambda: None)
            assert time.monotonic() - began < 3


def test_a_booking_that_is_not_waited_for_is_returned(permits: PermitHouse) -> None:
    """The line does not grow by those who were refused."""
    bank = permits.downstream(rate=TokenBucket(1, per=10), max_wait=0.0)
    patient = permits.downstream(rate=TokenBucket(1, per=10), max_wait=11)
    bank.call(lambda: None)
    ahead = booking.set(True)
    with pytest.raises(RateLimitedError):
        bank.call(lambda: None)
    booking.reset(ahead)
    permits.desk.denials.forget()
    with pytest.raises(RateLimitedError):  # the next slot is 20 s away
        patient.call(lambda: None)
    ahead = booking.set(True)
    with pytest.raises(RateLimitedError) as caught:
        bank.call(lambda: None)
    booking.reset(ahead)
    assert (caught.value.slot_at or 0) - permits.clock() == pytest.approx(20, abs=1)  # the store's, not this host's


def test_a_free_place_goes_to_the_longest_waiter() -> None:
    """Local places are handed over in order, to threads and to tasks."""
    slots = LocalSlots(1)
    assert slots.take()
    first, second = slots.ask(), slots.ask()
    assert slots.waiting == 2
    assert not slots.take()
    slots.release()
    assert first.done()
    assert not second.done()
    assert slots.withdraw(second)
    assert not slots.withdraw(first)
    slots.release()
    assert (slots.active, slots.waiting, slots.available) == (0, 0, 1)


def test_a_waiter_for_a_fleets_place_gets_it_from_another_process() -> None:
    """Places come back elsewhere: they are asked for again, soon."""
    store = MemoryPermits()
    one = Downstream("bank", store=Desk(store), concurrency=1)
    other = Downstream("bank", store=Desk(store), concurrency=Concurrency(1, max_wait=PATIENCE))
    block = one.permit(covers=False)
    block.__enter__()
    found: list[int] = []
    waiter = threading.Thread(target=lambda: found.append(other.call(lambda: 5)), daemon=True)
    waiter.start()
    block.__exit__(None, None, None)
    waiter.join(PATIENCE)
    assert found == [5]


def test_tasks_of_a_loop_share_places_and_wait_without_blocking_it() -> None:
    """Three places, twelve tasks, local and fleet; the loop goes on meanwhile."""

    async def scene(concurrency: Concurrency) -> tuple[int, int]:
        bank = real(concurrency=concurrency)
        inside = most = 0

        async def work() -> int:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.005)
            inside -= 1
            return 1

        done = await asyncio.gather(*(bank.acall(work) for _ in range(12)))
        return sum(done), most

    for local in (True, False):
        done, most = asyncio.run(scene(Concurrency(3, local=local, max_wait=PATIENCE)))
        assert done == 12
        assert 1 <= most <= 3


def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    """Neither a place taken nor a place in the queue."""

    async def scene() -> None:
        bank = real(concurrency=Concurrency(1, local=True, max_wait=PATIENCE))
        async with bank.permit(covers=False):
            waiting = asyncio.create_task(bank.acall(asyncio.sleep, 0))
            while not bank.stats().bulkhead_waiting:
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert bank.stats().bulkhead_waiting == 0
        assert bank.stats().bulkhead_active == 0
        await bank.acall(asyncio.sleep, 0)

    asyncio.run(scene())


def test_a_caller_cancelled_while_the_store_answers_leaves_no_place_taken(permits: PermitHouse) -> None:
    """The permit that arrives for nobody is undone."""
    permits.desk.in_process = False
    asked, answer = threading.Event(), threading.Event()
    undone = threading.Event()
    admit, release = permits.store.admit, permits.store.release

    def slow(ask: Any) -> Any:
        asked.set()
        assert answer.wait(PATIENCE)
        return admit(ask)

    bank = permits.downstream(concurrency=1)
    bank.call(lambda: None)
    permits.desk.flush()
    permits.store.admit = slow  # type: ignore[method-assign]
    permits.store.release = lambda slots: (release(slots), undone.set())  # type: ignore[method-assign]

    async def scene() -> None:
        call = asyncio.create_task(bank.acall(asyncio.sleep, 0))
        await asyncio.to_thread(asked.wait, PATIENCE)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        answer.set()
        assert await asyncio.to_thread(undone.wait, PATIENCE)

    asyncio.run(scene())
    permits.store.admit = admit  # type: ignore[method-assign]
    assert bank.call(lambda: 5) == 5


def test_a_slow_store_does_not_stop_the_loop(permits: PermitHouse) -> None:
    """Questions and reports of async calls are asked in a thread."""
    permits.desk.in_process = False
    bank = permits.downstream(rate=TokenBucket(100), circuit=CircuitBreaker(minimum_calls=1))
    goes_on = threading.Event()
    admit, report = permits.store.admit, permits.store.report

    def wait() -> None:
        assert goes_on.wait(PATIENCE), "the loop stood still"

    def slow_admit(ask: Any) -> Any:
        wait()
        return admit(ask)

    def slow_report(*args: Any, **options: Any) -> Any:
        wait()
        return report(*args, **options)

    permits.store.admit, permits.store.report = slow_admit, slow_report  # type: ignore[method-assign]

    async def fail() -> None:
        goes_on.clear()
        asyncio.get_running_loop().call_later(0.01, goes_on.set)
        raise ZeroDivisionError

    async def scene() -> None:
        asyncio.get_running_loop().call_later(0.01, goes_on.set)
        with pytest.raises(ZeroDivisionError):
            await bank.acall(fail)

    asyncio.run(scene())
    assert bank.circuit is not None
    assert bank.circuit.state == "open"


def test_the_loop_never_asks_a_store_that_is_elsewhere(permits: PermitHouse) -> None:
    """Refusals of rates, places and circuits, waits, failures, probes: every question is asked in another thread."""
    permits.desk.in_process = False
    here = threading.get_ident()
    asked_here: list[str] = []
    for name in ("admit", "report", "circuit", "force", "now", "unbook", "release", "adaptive", "adapt"):
        method = getattr(permits.store, name)

        def noted(*args: Any, _name: str = name, _method: Any = method, **options: Any) -> Any:
            if threading.get_ident() == here:
                asked_here.append(_name)
            return _method(*args, **options)

        setattr(permits.store, name, noted)
    breaker = CircuitBreaker(minimum_calls=1, failure_rate_threshold=0.1, wait_in_open=5)
    bank = permits.downstream(rate=TokenBucket(3, per=60), concurrency=1, circuit=breaker, max_wait=0.01)

    async def fail() -> None:
        raise ZeroDivisionError

    async def scene() -> None:
        await bank.acall(asyncio.sleep, 0)
        async with bank.permit(covers=False):
            with pytest.raises(BulkheadFullError):
                await bank.acall(asyncio.sleep, 0)
        await bank.acall(asyncio.sleep, 0)
        with pytest.raises(RateLimitedError):
            await bank.acall(asyncio.sleep, 0)
        permits.clock.advance(60)
        await asyncio.to_thread(permits.desk.denials.forget)
        with pytest.raises(ZeroDivisionError):
            await bank.acall(fail)
        with pytest.raises(CircuitOpenError):
            await bank.acall(fail)
        permits.clock.advance(5.001)
        with pytest.raises(ZeroDivisionError):
            await bank.acall(fail)

    asyncio.run(scene())
    assert asked_here == []


def test_a_call_whose_budget_is_over_is_not_made(permits: PermitHouse) -> None:
    """Nothing is asked and nothing runs."""
    bank = permits.downstream(rate=TokenBucket(100))
    token = timeouts.deadline_at.set(time.time() - 1)
    try:
        with pytest.raises(DownstreamTimeout, match="it was not made"):
            bank.call(lambda: None)
    finally:
        timeouts.deadline_at.reset(token)
    assert permits.store.asked["admit"] == 0


def test_a_turn_that_comes_a_moment_late_is_still_waited_for(
    permits: PermitHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those ahead were late for theirs by milliseconds: nobody has waited all that time to be refused for them."""
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        permits.clock.advance(seconds)
        if len(naps) == 1:  # somebody comes late for a turn of before
            permits.downstream(desk=permits.another_desk(), rate=rate).using(cost=0.004).call(lambda: None)

    rate = TokenBucket(1, per=1)
    bank = permits.downstream(rate=rate, max_wait=1)
    bank.call(lambda: None)
    monkeypatch.setattr("taskguard.downstream.admittance.time", SimpleNamespace(sleep=nap, monotonic=time.monotonic))
    assert bank.call(lambda: 5) == 5
    assert len(naps) == 2
    assert sum(naps) == pytest.approx(1.004, abs=0.001)


def test_a_place_is_asked_for_until_the_last_moment(permits: PermitHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rest ends with the wait, so that a place that comes in it is had."""
    naps: list[float] = []
    held = permits.downstream(concurrency=Concurrency(1)).permit(covers=False)

    def nap(seconds: float) -> None:
        naps.append(seconds)
        permits.clock.advance(seconds)
        if sum(naps) >= 0.1:
            held.__exit__(None, None, None)
            permits.desk.flush()

    held.__enter__()
    patient = permits.downstream(concurrency=Concurrency(1, max_wait=0.1))
    monkeypatch.setattr("taskguard.downstream.admittance.time", SimpleNamespace(sleep=nap, monotonic=time.monotonic))
    monkeypatch.setattr("taskguard.downstream.admittance.random.uniform", lambda least, most: most)
    assert patient.call(lambda: 5) == 5
    assert sum(naps) <= 0.111
