"""A refusal is remembered exactly as long as it must hold, and no longer."""

from __future__ import annotations

import math
import random
import threading

import pytest

from taskguard.downstream.denials import Denials
from taskguard.permits import Ask, Permit, RateAsk
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.stores.memory.permits import MemoryPermits
from tests.contracts.permits import MicroClock


class Seconds:
    """A monotonic clock by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


def test_a_refusal_holds_for_its_cost_and_more_until_its_wait_is_over(clock: Seconds) -> None:
    """A smaller cost may be admitted sooner: it is asked."""
    denials = Denials(clock=clock)
    denials.keep("bank", 2.0, 0.5, asked_at=clock.now)
    assert denials.left("bank", 2.0) == pytest.approx(0.5)
    assert denials.left("bank", 3.0) == pytest.approx(0.5)
    assert denials.left("bank", 1.0) == 0.0
    assert denials.left("shop", 2.0) == 0.0
    clock.now += 0.5
    assert denials.left("bank", 3.0) == 0.0


def test_each_cost_keeps_its_own_wait(clock: Seconds) -> None:
    """The dearer call waits longer; a later word on the cheaper one does not shorten that."""
    denials = Denials(clock=clock)
    denials.keep("bank", 5.0, 2.0, asked_at=clock.now)
    denials.keep("bank", 1.0, 0.3, asked_at=clock.now)
    assert denials.left("bank", 1.0) == pytest.approx(0.3)
    assert denials.left("bank", 4.0) == pytest.approx(0.3)
    assert denials.left("bank", 5.0) == pytest.approx(2.0)


def test_a_refusal_for_good_is_for_good(clock: Seconds) -> None:
    """A cost that the limit can never admit is not asked again until the rules change."""
    denials = Denials(clock=clock)
    denials.keep("bank", 50.0, None, asked_at=clock.now)
    clock.now += 1e9
    assert denials.left("bank", 50.0) == math.inf
    denials.forget("bank")
    assert denials.left("bank", 50.0) == 0.0


def test_the_wait_counts_from_before_the_store_was_asked(clock: Seconds) -> None:
    """The answer took its time: what is left is less, never more."""
    denials = Denials(clock=clock)
    denials.keep("bank", 1.0, 0.5, asked_at=clock.now - 0.4)
    assert denials.left("bank") == pytest.approx(0.1)
    denials.keep("shop", 1.0, 0.5, asked_at=clock.now - 0.6)
    assert denials.left("shop") == 0.0


def test_a_changed_rule_is_asked_again(clock: Seconds) -> None:
    """`forget` clears one limit, or all."""
    denials = Denials(clock=clock)
    for name in ("a", "b"):
        denials.keep(name, 1.0, 9.0, asked_at=clock.now)
    denials.forget("a")
    assert (denials.left("a"), denials.left("b")) == (0.0, pytest.approx(9.0))
    denials.forget()
    assert denials.left("b") == 0.0


def test_no_growth_per_denied_call_and_none_without_bound(clock: Seconds) -> None:
    """One entry a limit, a few costs each, a bounded number of limits: those whose wait is over make room first."""
    denials = Denials(clock=clock, most=100)
    for number in range(1000):
        denials.keep("bank", 1.0 + number, 1.0, asked_at=clock.now)
    assert len(denials) == 1
    assert len(denials._denied["bank"]) <= 4
    denials.keep("long", 1.0, 1000.0, asked_at=clock.now)
    for number in range(98):
        denials.keep(f"short {number}", 1.0, 1.0, asked_at=clock.now)
    clock.now += 2
    denials.keep("one more", 1.0, 1.0, asked_at=clock.now)
    assert denials.left("long") > 0
    for number in range(10_000):
        denials.keep(f"live {number}", 1.0, 1000.0, asked_at=clock.now)
    assert len(denials) <= 100


@pytest.mark.parametrize(
    "policy",
    [
        TokenBucket(7, per=3, burst=4),
        LeakyBucket(3),
        FixedWindow(5, per=2),
        SlidingWindow(5, per=2),
        SlidingLog(5, per=2),
    ],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("seed", range(5))
def test_a_remembered_refusal_is_what_the_store_would_have_said(policy: Rate, seed: int) -> None:
    """Whenever the memory refuses, the store refuses too, whoever came in between."""
    draw, micros, clock = random.Random(seed), MicroClock(), Seconds()
    permits, denials = MemoryPermits(micros), Denials(clock=clock)
    remembered = 0
    for _ in range(400):
        clock.now = 100.0 + micros.passed / 1e6
        cost = draw.choice((1.0, 2.0, 3.0))
        answer = None
        if (left := denials.left("bank", cost)) > 1e-9:
            remembered += 1
            assert not isinstance(permits.admit(Ask(rates=(RateAsk("bank", policy, cost),))), Permit), (cost, left)
        else:
            answer = permits.admit(Ask(rates=(RateAsk("bank", policy, cost),)))
            if not isinstance(answer, Permit):
                denials.keep("bank", cost, answer.retry_after, asked_at=clock.now)
        micros.advance(us=draw.randrange(200_000))
    assert remembered > 20


def test_threads_remember_beside_each_other(clock: Seconds) -> None:
    """No lock, and none needed: what a race may lose is one question more."""
    denials = Denials(clock=clock, most=50)
    trouble: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(3000):
                name = f"limit {draw.randrange(80)}"
                denials.keep(name, draw.random(), 1.0, asked_at=clock.now)
                assert denials.left(name, 2.0) <= 1.0
        except BaseException as exc:
            trouble.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not trouble
    assert len(denials) <= 50 + len(threads)
