"""What only the permits in process memory have to promise: threads, a bounded dictionary, one store a namespace."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from freezegun import freeze_time

from taskguard.errors import ConfigurationError
from taskguard.permits import Ask, CircuitView, RateAsk, SlotAsk
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.stores import open_permits
from taskguard.stores.memory import MemoryPermits
from taskguard.stores.memory.permits import SWEPT_FROM
from tests.contracts.permits import MicroClock, admitted, take

YEAR = 366 * 86400


@pytest.fixture
def micros() -> MicroClock:
    """A clock that moves only when the test says so."""
    return MicroClock()


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads change places as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize(
    "policy",
    [
        TokenBucket(1, per=YEAR, burst=50),
        LeakyBucket(1, per=YEAR),
        FixedWindow(50, per=YEAR),
        SlidingWindow(50, per=YEAR),
        SlidingLog(50, per=YEAR),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_threads_together_are_given_the_limit_and_not_one_more(policy: Rate) -> None:
    """Eight threads, twenty calls each."""
    permits, start = MemoryPermits(), threading.Barrier(8)

    def spend(_: int) -> int:
        start.wait(30)
        return sum(admitted(take(permits, policy)) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(spend, range(8))) == (1 if isinstance(policy, LeakyBucket) else 50)


def test_cells_that_say_nothing_any_more_are_swept(micros: MicroClock) -> None:
    """However many names there were, the dictionary is bounded by those that are live."""
    permits = MemoryPermits(micros)
    for n in range(20 * SWEPT_FROM):
        take(permits, TokenBucket(10), name=f"client-{n}")
        micros.advance(0.001)
    assert len(permits) <= SWEPT_FROM


def test_a_live_limit_is_never_forgotten_to_make_room(micros: MicroClock) -> None:
    """A used-up limit is still used up after any number of other names."""
    permits = MemoryPermits(micros)
    assert admitted(take(permits, TokenBucket(1, per=3600), name="mine"))
    permits.pause("mail", until=None, who="", why="")
    permits.force("bank", "forced_open", until=None, who="", why="")
    for n in range(5 * SWEPT_FROM):
        take(permits, TokenBucket(10), name=f"client-{n}")
        micros.advance(0.1)
    assert not admitted(take(permits, TokenBucket(1, per=3600), name="mine"))
    assert "mail" in permits.paused()
    assert permits.circuit("bank").state == "forced_open"


def test_refused_calls_leave_nothing_behind(micros: MicroClock) -> None:
    """Neither a new name whose call costs too much, nor a thousand refusals of one that is used up."""
    permits = MemoryPermits(micros)
    take(permits, TokenBucket(1))
    before = len(permits)
    for n in range(1000):
        take(permits, TokenBucket(1))
        take(permits, TokenBucket(1), 2, name=f"client-{n}", book=True)
        permits.admit(Ask(rates=(RateAsk("bank", TokenBucket(1)),), slot=SlotAsk(f"b-{n}", 5, "h", 9)))
    assert len(permits) == before


def test_a_namespace_is_one_store_in_a_process(namespace: str) -> None:
    """Who opens it twice shares its permits; with a clock of its own, a test has one of its own."""
    policy = TokenBucket(1, per=YEAR)
    assert admitted(take(open_permits("memory://", namespace=namespace), policy))
    assert not admitted(take(open_permits("memory://", namespace=namespace), policy))
    assert admitted(take(open_permits("memory://", namespace=f"{namespace}-other"), policy))
    assert admitted(take(open_permits("memory://", namespace=namespace, clock=MicroClock()), policy))


def test_frozen_time_freezes_the_limits() -> None:
    """The wall clock is asked, so that users' tests can move it."""
    with freeze_time(datetime(2026, 1, 1, tzinfo=UTC)) as frozen:
        permits = MemoryPermits()
        assert admitted(take(permits, TokenBucket(1)))
        assert not admitted(take(permits, TokenBucket(1)))
        frozen.tick(1)
        assert admitted(take(permits, TokenBucket(1)))


def test_a_watcher_in_another_thread_is_woken_by_a_change() -> None:
    """It rests on the condition that a change notifies, not on the next look."""
    permits, told, stop = MemoryPermits(), threading.Event(), threading.Event()

    def changed(view: CircuitView) -> None:
        assert view.state == "disabled"
        told.set()

    watcher = threading.Thread(target=permits.watch_circuits, args=(changed,), kwargs={"stop": stop.is_set})
    watcher.start()
    try:
        permits.force("bank", "disabled", until=None, who="", why="")
        assert told.wait(10)
    finally:
        stop.set()
        watcher.join(10)
    assert not watcher.is_alive()


@pytest.mark.parametrize("url", ["nonsense://x", "", "http://localhost"])
def test_a_url_of_no_store_is_answered_with_those_that_are(url: str) -> None:
    """One line, with the value."""
    with pytest.raises(ConfigurationError, match=r"is not a store URL; use one of redis://"):
        open_permits(url)
