"""Calls inside a block of their own downstream: its circuit still stops them, and its place serves one at a time."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest

from taskguard.celery.pausing import Pauser
from taskguard.downstream.admittance import booking
from taskguard.downstream.gathering import gather
from taskguard.downstream.slots import LONGEST, LocalSlots
from taskguard.downstream.storeclock import KEPT, StoreClock
from taskguard.errors import BulkheadFullError, CircuitOpenError, DownstreamTimeout, RateLimitedError, StoreUnavailable
from taskguard.policies import CircuitBreaker, Concurrency, LeakyBucket, Timeout
from tests.clocks import ManualClock
from tests.unit.permithouse import PATIENCE, PermitHouse

BOTH = pytest.mark.parametrize("local", [False, True], ids=["fleet", "local"])


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


class Dead:
    """A downstream that fails whoever reaches it."""

    def __init__(self) -> None:
        self.reached = 0

    def __call__(self) -> None:
        self.reached += 1
        raise ConnectionError


# -- the circuit ------------------------------------------------------------------------------------------------------


def test_an_open_circuit_stops_calls_inside_a_block(permits: PermitHouse) -> None:
    """The block was let in before it opened; after the wait, one call of the block is the probe."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=3, wait_in_open=10))
    dead = Dead()
    refused = 0
    with bank.permit():
        for _ in range(50):
            try:
                bank.call(dead)
            except ConnectionError:
                pass
            except CircuitOpenError:
                refused += 1
        assert (dead.reached, refused) == (3, 47)
        permits.clock.advance(10.1)
        for _ in range(50):
            with pytest.raises((ConnectionError, CircuitOpenError)):
                bank.call(dead)
        assert dead.reached == 4
        permits.clock.advance(60)
        bank.call(lambda: None)
    assert permits.store.circuit("bank").state == "closed"


def test_an_open_circuit_stops_async_calls_inside_a_block(permits: PermitHouse) -> None:
    """As it does sync ones."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=3))
    dead = Dead()

    async def ask() -> None:
        dead()

    async def scene() -> None:
        async with bank.permit():
            for _ in range(50):
                with pytest.raises((ConnectionError, CircuitOpenError)):
                    await bank.acall(ask)

    asyncio.run(scene())
    assert dead.reached == 3


def test_failures_inside_count_once(permits: PermitHouse) -> None:
    """Also those of calls that had a place of their own, and of calls inside calls."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=100), concurrency=5)
    dead = Dead()
    with pytest.raises(ConnectionError), bank.permit():
        bank.call(lambda: bank.call(dead))
    assert (dead.reached, bank.stats().circuit_breaker_failures_total) == (1, 1)
    together = threading.Barrier(2)

    def both() -> None:
        together.wait(PATIENCE)
        dead()

    with pytest.raises(ConnectionError), bank.permit():
        gather([partial(bank.call, both)] * 2, limit=2)
    assert (dead.reached, bank.stats().circuit_breaker_failures_total) == (3, 3)


# -- the place --------------------------------------------------------------------------------------------------------


@BOTH
def test_concurrent_calls_inside_a_block_keep_to_the_places(permits: PermitHouse, local: bool) -> None:
    """One has the block's place; the others wait for places of their own."""
    bank = permits.downstream(concurrency=Concurrency(3, local=local, max_wait=PATIENCE))
    lock, full = threading.Lock(), threading.Event()
    inside = most = 0

    def work() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            if inside == 3:
                full.set()
        assert full.wait(PATIENCE)
        with lock:
            inside -= 1

    with bank.permit():
        gather([partial(bank.call, work)] * 40, limit=20)
        assert bank.stats().bulkhead_active == 1
    assert most == 3
    assert bank.stats().bulkhead_active == 0


@BOTH
def test_concurrent_tasks_inside_a_block_keep_to_the_places(permits: PermitHouse, local: bool) -> None:
    """Who finds no place is refused, and the block's place comes back to the block."""
    bank = permits.downstream(concurrency=Concurrency(2, local=local))

    async def scene() -> None:
        goes_on = asyncio.Event()
        async with bank.permit():
            calls = [asyncio.create_task(bank.acall(goes_on.wait)) for _ in range(5)]
            done, under_way = await asyncio.wait(calls, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 3:
                done, under_way = await asyncio.wait(calls, timeout=0.01)
            assert all(isinstance(each.exception(), BulkheadFullError) for each in done)
            goes_on.set()
            assert await asyncio.gather(*under_way) == [True, True]
            for _ in range(3):
                await bank.acall(goes_on.wait)

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))
    assert bank.stats().bulkhead_active == 0


@BOTH
def test_a_call_inside_a_call_inside_a_block_has_the_same_place(permits: PermitHouse, local: bool) -> None:
    """One after the other in one another: that is one call under way."""
    bank = permits.downstream(concurrency=Concurrency(1, local=local))

    async def answer() -> int:
        return 7

    async def scene() -> int:
        async with bank.permit(), bank.permit():
            return await bank.acall(partial(bank.acall, answer))

    with bank.permit(), bank.permit():
        assert bank.call(lambda: bank.call(lambda: bank.call(lambda: 7))) == 7
    assert asyncio.run(scene()) == 7
    assert bank.stats().bulkhead_active == 0


@BOTH
def test_a_thread_that_is_left_behind_keeps_its_place(permits: PermitHouse, local: bool) -> None:
    """Until it ends by itself, also where it had a block's; the circuit is told at once."""
    bank = permits.downstream(
        concurrency=Concurrency(1, local=local), timeout=Timeout(total=0.05, thread=True), circuit=CircuitBreaker()
    )
    for in_block in (False, True):
        goes_on, ended = threading.Event(), threading.Event()

        def hang(goes_on: threading.Event = goes_on) -> None:
            goes_on.wait(PATIENCE)

        failed = bank.stats().circuit_breaker_failures_total
        with pytest.raises(DownstreamTimeout), bank.permit() if in_block else nullcontext():
            bank.call(hang)
        assert bank.stats().circuit_breaker_failures_total == failed + 1
        assert bank.stats().bulkhead_active == 1
        with pytest.raises(BulkheadFullError):
            bank.call(lambda: None)
        goes_on.set()
        for _ in range(1000):
            if not bank.stats().bulkhead_active:
                break
            ended.wait(0.01)
        assert bank.call(lambda: 7) == 7


def test_who_finds_no_local_place_is_told_a_turn_of_its_own() -> None:
    """By how long places are held: they do not come back together, and never later than `LONGEST`."""
    slots = LocalSlots(2, clock=lambda: 7.0)
    slots.take()
    slots.take()
    slots.release(0.4)
    slots.take()
    turns = [slots.turn() for _ in range(20)]
    assert all(later - sooner == pytest.approx(0.2) for sooner, later in pairwise(turns))
    assert turns[0] == pytest.approx(0.2)
    assert turns[-1] == pytest.approx(4.0)
    assert max(slots.turn() for _ in range(1000)) <= LONGEST
    slots.release(0.4)
    slots.release(0.4)
    assert slots.turn() < 0.3  # the line is empty


def test_refusals_of_a_local_bulkhead_are_spaced(permits: PermitHouse) -> None:
    """A task rests for as long as it is told."""
    bank = permits.downstream(concurrency=Concurrency(1, local=True))
    waits = []
    with bank.permit(covers=False):
        for _ in range(10):
            with pytest.raises(BulkheadFullError) as caught:
                bank.call(lambda: None)
            waits.append(caught.value.retry_after or 0.0)
    assert waits == sorted(set(waits))
    assert waits[-1] > 5 * waits[0]


# -- the store's clock ------------------------------------------------------------------------------------------------


def test_a_slot_is_told_by_the_stores_clock(permits: PermitHouse) -> None:
    """This host's may be wrong, and the store compares with its own."""
    bank = permits.downstream(rate=LeakyBucket(1, per=10))
    bank.call(lambda: None)
    ahead = booking.set(True)
    try:
        with pytest.raises(RateLimitedError) as caught:
            bank.call(lambda: None)
    finally:
        booking.reset(ahead)
    assert caught.value.slot_at == pytest.approx(permits.clock() + 10, abs=0.01)


def test_a_stores_clock_is_asked_now_and_then() -> None:
    """Between two questions by this process's pace; what was measured holds while the store does not answer."""
    here, there = ManualClock(1000.0), ManualClock(5000.0)
    asked: list[float] = []
    away = False

    def ask() -> float:
        if away:
            raise StoreUnavailable("no answer")
        asked.append(there())
        return there()

    clock = StoreClock(ask, here)
    assert (clock.now(), clock.now()) == (5000.0, 5000.0)
    here.advance(KEPT)
    assert (clock.now(), len(asked)) == (5000.0 + KEPT, 1)
    here.advance(1)
    assert (clock.now(), len(asked)) == (5000.0, 2)
    away = True
    here.advance(KEPT + 1)
    assert clock.now() == 5000.0 + KEPT + 1


# -- queues -----------------------------------------------------------------------------------------------------------


def test_a_resumed_queue_is_selected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery 5.5's add_task_queue leaves deselected what cancel_task_queue deselected: lost at the next reconnect."""

    class Queues(dict[str, object]):
        consume_from: dict[str, object]

    queues = Queues(tasks=SimpleNamespace(name="tasks"), other=SimpleNamespace(name="other"))
    queues.consume_from = dict(queues)
    consumed = {"tasks", "other"}

    class Consumer:
        app = SimpleNamespace(amqp=SimpleNamespace(queues=queues))

        @property
        def task_consumer(self) -> SimpleNamespace:
            return SimpleNamespace(queues=[queues[name] for name in consumed])

        def cancel_task_queue(self, queue: str) -> None:
            queues.consume_from.pop(queue)
            consumed.discard(queue)

        def add_task_queue(self, queue: str) -> None:
            consumed.add(queue)

    monkeypatch.setattr(
        "taskguard.celery.pausing.runtime_of", lambda app: SimpleNamespace(observers=lambda event: None)
    )
    pauser, consumer = Pauser.__new__(Pauser), Consumer()
    pauser._held = set()
    pauser._apply(consumer, {"tasks": (None, "ann", "a test")})
    assert (consumed, set(queues.consume_from)) == ({"other"}, {"other"})
    pauser._apply(consumer, {})
    assert (consumed, set(queues.consume_from)) == ({"other", "tasks"}, {"other", "tasks"})
