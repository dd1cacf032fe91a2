"""Places: taken, kept while the call lasts, given back once, and never more than there are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from taskguard.errors import BulkheadFullError, RateLimitedError
from taskguard.permits import Slot
from taskguard.policies import (
    CircuitBreaker,
    Concurrency,
    FixedWindow,
    TokenBucket,
)
from tests.unit.permithouse import PATIENCE, PermitHouse, threads


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


@pytest.fixture
def _hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_place_comes_back_when_the_call_raises(permits: PermitHouse) -> None:
    """Trap 32: whatever ends the call gives its place back, fleet or local."""
    for name, concurrency in (("fleet", 1), ("local", Concurrency(1, local=True))):
        bank = permits.downstream(name, concurrency=concurrency)
        for error in (ValueError, SystemExit, KeyboardInterrupt):

            def leave(error: type[BaseException] = error) -> None:
                raise error

            with pytest.raises(error):
                bank.call(leave)
        assert bank.call(lambda: 5) == 5
        assert bank.stats().bulkhead_active == 0


def test_a_full_bulkhead_refuses_and_counts(permits: PermitHouse) -> None:
    """No waiting is declared, so none is done."""
    for name, concurrency in (("fleet", 2), ("local", Concurrency(2, local=True))):
        bank = permits.downstream(name, concurrency=concurrency)
        with bank.permit(covers=False), bank.permit(covers=False):
            with pytest.raises(BulkheadFullError, match="all 2 places") as caught:
                bank.call(lambda: None)
            assert caught.value.retry_after is not None
            stats = bank.stats()
            assert (stats.bulkhead_active, stats.bulkhead_available_permits, stats.bulkhead_rejected_total) == (2, 0, 1)
        bank.call(lambda: None)


def test_a_release_rides_along_with_the_next_question(permits: PermitHouse) -> None:
    """One round trip a call: the store sees no release of its own while calls follow each other."""
    bank = permits.downstream(concurrency=1)
    permits.desk._releases.due_at = float("inf")
    permits.desk._releases.arm = lambda **_: None  # type: ignore[method-assign]
    for _ in range(20):
        bank.call(lambda: None)
    assert permits.store.asked["admit"] == 20
    assert permits.store.asked["release"] == 0


def test_a_release_that_nobody_takes_along_is_sent_soon(permits: PermitHouse) -> None:
    """Another process gets the place without this one calling again."""
    sent = threading.Event()
    release = permits.store.release
    permits.store.release = lambda slots: (release(slots), sent.set())  # type: ignore[method-assign]
    permits.downstream(concurrency=1).call(lambda: None)
    assert sent.wait(PATIENCE)
    other = permits.downstream(desk=permits.another_desk(), concurrency=1)
    assert other.call(lambda: 5) == 5


def test_a_place_is_given_back_once(permits: PermitHouse) -> None:
    """Trap 32: a second release, or one by who has not got it, frees nobody else's place."""
    bank = permits.downstream(concurrency=1)
    block = bank.permit(covers=False)
    block.__enter__()
    slot = block.passed.slot
    assert slot is not None
    block.__exit__(None, None, None)
    permits.desk.flush()
    with bank.permit(covers=False):
        block.__exit__(None, None, None)
        permits.desk.release(slot, lease=30.0)
        permits.store.release([slot, Slot("bank", "stranger")])
        permits.desk.flush()
        with pytest.raises(BulkheadFullError):
            bank.call(lambda: None)


def test_a_long_call_keeps_its_place(permits: PermitHouse) -> None:
    """Trap 32: leases of calls under way are renewed; a killed process's end."""
    bank = permits.downstream(concurrency=Concurrency(1, lease=9))
    other = permits.downstream(desk=permits.another_desk(), concurrency=Concurrency(1, lease=9))
    with bank.permit(covers=False):
        for _ in range(5):
            permits.clock.advance(6)
            permits.desk._renewals[9.0].tend()
            with pytest.raises(BulkheadFullError):
                other.call(lambda: None)
        permits.clock.advance(9.001)
        assert other.call(lambda: 5) == 5


def test_a_lost_place_is_told_and_not_released(permits: PermitHouse) -> None:
    """Trap 32: a lease that ended while the call ran is reported, and another's place is left alone."""
    bank = permits.downstream(concurrency=Concurrency(1, lease=9))
    other = permits.downstream(desk=permits.another_desk(), concurrency=Concurrency(1, lease=9))
    block = bank.permit(covers=False)
    block.__enter__()
    permits.clock.advance(9.001)
    with other.permit(covers=False):
        permits.desk._renewals[9.0].tend()
        assert [event.key for event in permits.told("slot_lost")] == ["bank"]
        assert bank.stats().bulkhead_lost_total == 1
        block.__exit__(None, None, None)
        permits.desk.flush()
        with pytest.raises(BulkheadFullError):
            bank.call(lambda: None)


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("local", [False, True])
def test_never_more_calls_than_places_between_threads(permits: PermitHouse, local: bool) -> None:
    """Traps 26 and 27: twelve threads, three places, no call too many, none lost for good."""
    bank = permits.downstream(concurrency=Concurrency(3, local=local, max_wait=PATIENCE))
    lock = threading.Lock()
    inside, most = [0], [0]

    def work() -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        with lock:
            inside[0] -= 1

    found = threads(12, lambda _: [bank.call(work) for _ in range(10)] and None)
    assert found == [None] * 12
    assert 1 <= most[0] <= 3
    assert bank.stats().bulkhead_active == 0


@pytest.mark.usefixtures("_hasty")
def test_who_does_not_wait_is_never_refused_for_a_busy_lock(permits: PermitHouse) -> None:
    """Trap 29: with a place for each, nobody is turned away."""
    bank = permits.downstream(concurrency=Concurrency(8, local=True), rate=TokenBucket(1e6))
    assert threads(8, lambda _: [bank.call(lambda: 1) for _ in range(50)].count(1)) == [50] * 8


def test_nothing_is_locked_while_a_call_runs(permits: PermitHouse) -> None:
    """Trap 28: calls that last run side by side."""
    bank = permits.downstream(circuit=CircuitBreaker(), rate=TokenBucket(1e6), concurrency=5)
    together = threading.Barrier(5)
    assert threads(5, lambda _: bank.call(lambda: together.wait(PATIENCE) >= 0)) == [True] * 5


def test_a_call_inside_its_own_block_has_its_place_and_its_permit_once(permits: PermitHouse) -> None:
    """A task admitted by a downstream may call it: no second slot, and the first call is paid for."""
    bank = permits.downstream(rate=FixedWindow(2, per=60), concurrency=1, circuit=CircuitBreaker())
    with bank.permit():
        bank.call(lambda: None)
        bank.call(lambda: None)
        with pytest.raises(RateLimitedError):
            bank.call(lambda: None)
    assert bank.stats().bulkhead_active == 0


def test_a_call_inside_a_probe_speaks_for_it(permits: PermitHouse) -> None:
    """With one probe allowed, the call inside the block is that probe; its failure is the block's."""
    breaker = CircuitBreaker(minimum_calls=1, wait_in_open=5)
    bank = permits.downstream(circuit=breaker)

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        bank.call(fail)
    permits.clock.advance(5.001)
    with bank.permit(), pytest.raises(ValueError):
        bank.call(fail)
    assert permits.store.circuit("bank").state == "open"
    permits.clock.advance(600)
    with bank.permit():
        bank.call(lambda: None)
    assert permits.store.circuit("bank").state == "closed"
