"""Leased permits never exceed ``burst + rate * w`` in any window, whatever processes do with them.

The adversary runs in virtual time over the real `Leased` and the real bucket: processes hoard and dump, idle for whole
lulls, die with permits in hand, and their questions and calls take as long as it pleases.
"""

from __future__ import annotations

import math
import os
import random

import pytest

from taskguard.downstream.leases import Leased, Loan, lend_by_asking, shared_bucket
from taskguard.errors import ConfigurationError, StoreUnavailable
from taskguard.permits import Answer, Ask
from taskguard.policies.rates import TokenBucket
from taskguard.stores.memory.permits import MemoryPermits
from tests.contracts.permits import MicroClock


class Lending(MemoryPermits):
    """Lends a part where it cannot lend all, as Redis does, and counts how often it was asked."""

    def __init__(self, clock: MicroClock) -> None:
        super().__init__(clock)
        self.asked = 0

    def admit(self, ask: Ask) -> Answer:
        self.asked += 1
        return super().admit(ask)

    def lend(self, name: str, policy: TokenBucket, *, most: int) -> Loan:
        self.asked += 1
        return lend_by_asking(super().admit, name, policy, most=most)


class Process:
    """One process: a `Leased` of its own and a character."""

    def __init__(
        self, store: Lending, policy: TokenBucket, clock: MicroClock, dice: random.Random, strict: bool
    ) -> None:
        self.leased = Leased(
            store, "bank", policy, lifetime=LIFETIME, strict=strict, most=dice.choice((None, 1, 8, 1000)),
            clock=lambda: clock.passed / 1e6,
        )  # fmt: skip
        self.hoards, self.chance = dice.random() < 0.6, dice.random()

    def hoard(self) -> None:
        """Make demand look large, so that the next lease is large, and spend one permit of it only."""
        self.leased._size = self.leased.most
        self.leased._not_before = -math.inf


LIFETIME = 0.05


def over(spent: list[int], policy: TokenBucket, grace: float) -> float:
    """By how many permits the worst of all windows exceeds ``burst + rate * (w + grace)``."""
    rate, worst, least = policy.limit / policy.period, -math.inf, math.inf
    for count, at in enumerate(sorted(spent)):
        seconds = at / 1e6
        least = min(least, count - rate * seconds)
        worst = max(worst, count + 1 - rate * seconds - least)
    return worst - policy.most - rate * grace


def simulate(seed: int, *, strict: bool) -> tuple[float, int]:
    """The worst window's excess, and how many calls were admitted."""
    dice, clock = random.Random(seed), MicroClock()
    rate = dice.choice((50, 200, 1000, 5000))
    policy = TokenBucket(rate, burst=max(2.0, rate * LIFETIME * dice.choice((1.2, 2, 8)) + 1))
    store = Lending(clock)
    processes = [Process(store, policy, clock, dice, strict) for _ in range(dice.choice((1, 2, 7, 64)))]
    spent: list[int] = []
    while clock.passed < 2_000_000:
        step = dice.choice((1, 500, 5_000, 20_000, 49_999, 50_000, 400_000) if dice.random() < 0.3 else (500, 5_000))
        clock.advance(us=step)
        dump = dice.random() < 0.15
        for number, process in enumerate(processes):
            if dice.random() < 0.01:
                processes[number] = Process(store, policy, clock, dice, strict)  # killed with permits in hand
            elif process.hoards and not dump:
                process.hoard()
                if process.leased.acquire() == 0.0:
                    spent.append(clock.passed)
            elif dump or dice.random() < process.chance:
                while process.leased.acquire() == 0.0:
                    spent.append(clock.passed)
    return over(spent, policy, 0.0 if strict else LIFETIME), len(spent)


@pytest.mark.parametrize("seed", range(60))
def test_no_window_sees_more_than_the_burst_and_the_rate(seed: int) -> None:
    """Strict leases: the nominal envelope, for 1 to 64 processes."""
    excess, admitted = simulate(seed, strict=True)
    assert admitted
    assert excess <= 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_loose_leases_keep_their_wider_bound(seed: int) -> None:
    """Without the smaller shared bucket: ``burst + rate * (w + lifetime)``."""
    excess, admitted = simulate(seed, strict=False)
    assert admitted
    assert excess <= 1e-6


def test_the_adversary_would_find_permits_that_outlive_their_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can fail: with leases that never end, windows see more than they may."""
    monkeypatch.setattr(Leased, "_acquire_slowly", _never_ending)
    assert max(simulate(seed, strict=True)[0] for seed in range(20)) > 1


def _never_ending(self: Leased) -> float:
    now = self._clock()
    if now < self._not_before:
        return self._not_before - now
    loan = self._lend(self.name, self.shared, most=self.most)
    if loan.permits < self.most:
        self._not_before = now + 0.005
    self._held.extend([math.inf] * loan.permits)
    return 0.0 if self._held and self._held.popleft() else 1.0


def leased(store: MemoryPermits, clock: MicroClock, policy: TokenBucket, **options: object) -> Leased:
    return Leased(store, "bank", policy, clock=lambda: clock.passed / 1e6, **options)  # type: ignore[arg-type]


def test_demand_is_followed() -> None:
    """At full speed a lease holds what the rate yields in its life; a lone call holds one."""
    clock = MicroClock()
    store = Lending(clock)
    ours = leased(store, clock, TokenBucket(10_000, burst=2000))
    admitted = 0
    for _ in range(2000):
        clock.advance(us=500)
        while ours.acquire() == 0.0:
            admitted += 1
    assert store.asked / admitted <= 0.1
    assert admitted >= 0.95 * 10_000
    for _ in range(12):
        clock.advance(1)
        assert ours.acquire() == 0.0
    before = store.asked
    for _ in range(10):
        clock.advance(1)
        ours.acquire()
    assert store.asked - before == 10
    assert len(ours._held) == 0


def test_a_lease_that_is_over_is_dropped_and_not_given_back() -> None:
    """What was not spent in time is lost to everybody: only too little is admitted."""
    clock = MicroClock()
    store = Lending(clock)
    ours = leased(store, clock, TokenBucket(10, burst=4), lifetime=0.1)
    ours._size = 3
    assert ours.shared.most == 3
    ours.most = 3
    assert ours.acquire() == 0.0
    clock.advance(us=100_000)
    assert ours.acquire() == 0.0
    assert store.asked == 2
    assert ours.acquire() > 0


def test_expiry_counts_from_before_the_store_was_asked() -> None:
    """An answer that took longer than the lease brings nothing that may be spent."""
    clock = MicroClock()

    class Slow(Lending):
        def lend(self, name: str, policy: TokenBucket, *, most: int) -> Loan:
            loan = super().lend(name, policy, most=most)
            clock.advance(0.06)
            return loan

    ours = leased(Slow(clock), clock, TokenBucket(1000, burst=200))
    assert ours.acquire() > 0
    assert ours.acquire() > 0


def test_while_there_is_nothing_the_store_is_left_alone() -> None:
    """After a lease that fell short, a tenth of its life passes before the next question."""
    clock = MicroClock()
    store = Lending(clock)
    ours = leased(store, clock, TokenBucket(10, burst=2), lifetime=0.1)
    while ours.acquire() == 0.0:
        pass
    asked = store.asked
    waits = [ours.acquire() for _ in range(1000)]
    assert store.asked == asked
    assert min(waits) > 0
    clock.advance(waits[-1] + 1e-6)
    ours.acquire()
    assert store.asked == asked + 1


def test_another_cost_is_debited_at_once() -> None:
    """It is within the same bound, and a cost above the shared burst is refused for good."""
    clock = MicroClock()
    ours = leased(MemoryPermits(clock), clock, TokenBucket(100, burst=15))
    assert ours.acquire(10.0) == 0.0
    assert ours.acquire(2.5) > 0
    assert ours.acquire(100.0) == math.inf


def test_a_store_that_cannot_lend_parts_is_asked_for_what_is_left() -> None:
    """Any `PermitStore` will do: twice asked at most."""
    clock = MicroClock()
    ours = leased(MemoryPermits(clock), clock, TokenBucket(100, burst=15))
    ours._size = 8
    ours.most = 8
    assert sum(ours.acquire() == 0.0 for _ in range(50)) == 10
    assert shared_bucket(ours.policy, ours.lifetime).most == 10


def test_a_forked_child_spends_nothing_of_its_parents() -> None:
    """Both would spend the same permits."""
    clock = MicroClock()
    ours = leased(Lending(clock), clock, TokenBucket(1000, burst=200))
    ours._size = 20
    assert ours.acquire() == 0.0
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"%d" % len(ours._held))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"0"
    assert len(ours._held) == 19


def test_a_store_that_is_down_is_said() -> None:
    """Permits in hand are spent; beyond them the caller is told."""
    clock = MicroClock()

    class Down(Lending):
        down = False

        def lend(self, name: str, policy: TokenBucket, *, most: int) -> Loan:
            if self.down:
                raise StoreUnavailable("gone")
            return super().lend(name, policy, most=most)

    store = Down(clock)
    ours = leased(store, clock, TokenBucket(1000, burst=200))
    ours._size = 3
    assert ours.acquire() == 0.0
    store.down = True
    assert [ours.acquire(), ours.acquire()] == [0.0, 0.0]
    with pytest.raises(StoreUnavailable):
        ours.acquire()


@pytest.mark.parametrize(("policy", "words"), [
    (TokenBucket(100, burst=5), "lower lifetime to 0.04 s or raise burst"),
    (TokenBucket(100, burst=1), "raise burst"),
])  # fmt: skip
def test_a_burst_too_small_for_leases_is_refused_when_it_is_declared(policy: TokenBucket, words: str) -> None:
    """The message has the numbers and the way out."""
    with pytest.raises(ConfigurationError, match=words):
        Leased(MemoryPermits(), "bank", policy)
    with pytest.raises(ConfigurationError, match="0 leaves no time"):
        Leased(MemoryPermits(), "bank", TokenBucket(100), lifetime=0)
