"""A store that is down is asked once a pause, and everybody else is told at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from taskguard.downstream.leases import Leased, Lender, Loan
from taskguard.downstream.outage import FIRST_PAUSE, LONGEST_PAUSE, Outage, Shielded
from taskguard.errors import StoreError, StoreUnavailable
from taskguard.permits import Ask, Permit, RateAsk
from taskguard.policies.rates import TokenBucket
from taskguard.stores.memory.permits import MemoryPermits

ASK = Ask(rates=(RateAsk("bank", TokenBucket(1000)),))


class Seconds:
    """A monotonic clock by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Failing(MemoryPermits):
    """A store that fails while it is told to, and counts who asks."""

    def __init__(self) -> None:
        super().__init__(lambda: 1.75e9)
        self.error: Callable[[], StoreError] | None = None
        self.asked = 0

    def _run(self, cells: Any, work: Any) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error()
        return super()._run(cells, work)


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def store() -> Failing:
    return Failing()


@pytest.fixture
def shielded(store: Failing, clock: Seconds) -> Shielded:
    return Shielded(store, Outage(clock=clock, chance=lambda: 0.0))


def gone() -> StoreUnavailable:
    return StoreUnavailable("store redis://nowhere does not answer")


def refused(shielded: Shielded) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as caught:
        shielded.admit(ASK)
    return caught.value


def test_after_a_failure_nobody_asks_until_the_pause_is_over(
    shielded: Shielded, store: Failing, clock: Seconds
) -> None:
    """One call finds out; the others are told at once, each with an exception of its own."""
    store.error = gone
    refused(shielded)
    told = [refused(shielded) for _ in range(100)]
    assert store.asked == 1
    assert len({id(error) for error in told}) == 100
    assert "does not answer; not asked again within 0.1 s" in str(told[0])
    clock.now += FIRST_PAUSE
    refused(shielded)
    refused(shielded)
    assert store.asked == 2


def test_the_pause_grows_to_its_bound(shielded: Shielded, store: Failing, clock: Seconds) -> None:
    """Doubled each time, so that a store that comes up under load is left alone, but noticed within the longest."""
    store.error = gone
    pauses = []
    for _ in range(8):
        refused(shielded)
        pauses.append(shielded.outage.left)
        clock.now += shielded.outage.left
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE])


def test_an_outage_is_two_log_lines(
    shielded: Shielded, store: Failing, clock: Seconds, caplog: pytest.LogCaptureFixture
) -> None:
    """One when it begins, one when it ends, whatever the traffic and however often it was found to last."""
    caplog.set_level(logging.INFO, "taskguard.downstream.outage")
    store.error = gone
    for _ in range(50):
        refused(shielded)
        clock.now += 0.3
    store.error = None
    clock.now += LONGEST_PAUSE
    for _ in range(50):
        assert isinstance(shielded.admit(ASK), Permit)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "goes by" in caplog.text or "go by" in caplog.text
    assert "answers again after 17.0 s" in caplog.text
    assert shielded.outage.since is None


def test_recovery_costs_no_call(shielded: Shielded, store: Failing, clock: Seconds) -> None:
    """The first call after the pause is answered, and so are all that follow."""
    store.error = gone
    refused(shielded)
    store.error = None
    clock.now += FIRST_PAUSE
    assert isinstance(shielded.admit(ASK), Permit)
    assert isinstance(shielded.admit(ASK), Permit)


def test_a_call_that_finds_out_is_alone(shielded: Shielded, store: Failing, clock: Seconds) -> None:
    """While one call waits for the store, the others do not wait with it."""
    store.error = gone
    refused(shielded)
    clock.now += FIRST_PAUSE

    def meanwhile() -> StoreUnavailable:
        store.error = gone
        asked = store.asked
        refused(shielded)
        assert store.asked == asked
        return gone()

    store.error = meanwhile
    refused(shielded)


def test_a_wrong_password_is_an_outage_and_a_bad_key_is_not(shielded: Shielded, store: Failing) -> None:
    """Errors that waiting does not mend count as an outage when there is nothing else."""
    store.error = lambda: StoreError("store refused: WRONGPASS")
    for _ in range(3):
        with pytest.raises(StoreError, match="WRONGPASS"):
            shielded.admit(ASK)
    with pytest.raises(StoreUnavailable, match="not asked again"):
        shielded.admit(ASK)


def test_single_errors_between_answers_do_not_add_up(shielded: Shielded, store: Failing) -> None:
    """One limit whose key is broken must not stop the others."""
    for _ in range(20):
        store.error = lambda: StoreError("store failed: WRONGTYPE")
        with pytest.raises(StoreError):
            shielded.admit(ASK)
        store.error = None
        shielded.admit(ASK)
    assert shielded.outage.since is None


def test_what_interrupts_a_call_is_no_outage(shielded: Shielded, store: Failing) -> None:
    """A soft time limit in the middle of a call says nothing about the store."""

    class SoftTimeLimit(Exception):
        pass

    def interrupted() -> StoreError:
        raise SoftTimeLimit

    store.error = interrupted
    with pytest.raises(SoftTimeLimit):
        shielded.admit(ASK)
    assert shielded.outage.since is None


def test_every_operation_goes_through_the_shield(shielded: Shielded, store: Failing) -> None:
    """No operation waits for a store that is known to be down."""
    store.error = gone
    refused(shielded)
    calls: list[Callable[[], object]] = [
        lambda: shielded.release([]),
        lambda: shielded.renew_slots([], lease=1),
        lambda: shielded.unbook("bank", 1.0),
        lambda: shielded.circuit("bank"),
        shielded.circuits,
        lambda: shielded.force("bank", "closed", until=None, who="ann", why=""),
        lambda: shielded.adapt("bank", 1.0, why=""),
        lambda: shielded.adaptive("bank"),
        lambda: shielded.pause("queue", until=None, who="", why=""),
        lambda: shielded.resume("queue"),
        shielded.paused,
        shielded.now,
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="not asked again"):
            call()
    assert store.asked == 1


def test_a_refused_call_takes_microseconds(store: Failing) -> None:
    """Far below any wait for a network; the figure is in the benchmarks."""
    shielded = Shielded(store, Outage(clock=time.monotonic, chance=lambda: 0.0))
    store.error = gone
    shielded.outage.failed(gone())
    shielded.outage._until = time.monotonic() + 60
    began = time.perf_counter()
    for _ in range(1000):
        refused(shielded)
    assert time.perf_counter() - began < 0.5
    assert store.asked == 0


def test_a_store_that_lends_does_so_through_the_shield(store: Failing, clock: Seconds) -> None:
    """And one that does not is not taken for one that does."""

    class Lending(Failing):
        def lend(self, name: str, policy: TokenBucket, *, most: int) -> Loan:
            if self.error is not None:
                raise self.error()
            return Loan(most)

    assert not isinstance(Shielded(store), Lender)
    lending = Lending()
    shielded = Shielded(lending, Outage(clock=clock))
    leased = Leased(shielded, "bank", TokenBucket(1000))
    assert isinstance(shielded, Lender)
    assert leased.acquire() == 0.0
    lending.error = gone
    with pytest.raises(StoreUnavailable, match=r"does not answer$"):
        leased.acquire()
    with pytest.raises(StoreUnavailable, match="not asked again"):
        leased.acquire()
