"""A rate of one process: the specification's answers, for threads, and nothing kept for ever."""

from __future__ import annotations

import sys
import threading
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard import ConfigurationError, LeakyBucket, LocalRate, SlidingLog, TokenBucket
from taskguard.limits import rates

POLICIES = (TokenBucket(7, per=3, burst=4), TokenBucket(0.3, per=1, burst=1.5), LeakyBucket(3, per=7), LeakyBucket(50))
MOMENTS = st.lists(
    st.tuples(st.integers(0, 4_000_000), st.sampled_from((1.0, 1.0, 1.0, 2, 0.7, 30)), st.sampled_from("abc")),
    max_size=60,
)


class Clock:
    """Seconds, counted in whole microseconds."""

    def __init__(self) -> None:
        self.us = 0

    def __call__(self) -> float:
        return self.us / 1e6


@given(policy=st.sampled_from(POLICIES), moments=MOMENTS)
def test_it_decides_as_the_specification_does(policy: Any, moments: list[tuple[int, float, str]]) -> None:
    """Of one bucket, and of each key's: who is let in, and how long the others are to wait."""
    clock, one, many = Clock(), None, {}
    limit = LocalRate(policy, clock=clock)
    terms = rates.terms_of(policy)
    for passed, cost, key in moments:
        clock.us += passed
        now = float(clock.us)
        verdict = rates.decide(terms, one, now, cost)
        one = verdict.state if verdict.wait == 0.0 else one
        assert_same(limit.acquire(cost), verdict.wait)
        verdict = rates.decide(terms, many.get(key), now, cost)
        if verdict.wait == 0.0:
            many[key] = verdict.state
        assert_same(limit.acquire_for(key, cost), verdict.wait)


def assert_same(wait: float, expected: float | None) -> None:
    """The specification's waits are whole microseconds."""
    if expected is None:
        assert wait == inf
    elif expected == 0.0:
        assert wait == 0.0
    else:
        assert 0.0 < wait * 1e6 <= expected + 0.01
        assert wait * 1e6 > expected - 1.01


def test_after_the_wait_it_is_admitted() -> None:
    """Also of a million a second, on a clock that counts since the year."""
    for policy in (TokenBucket(1_000_000, burst=1), TokenBucket(3, per=7), LeakyBucket(11)):
        clock = [3.2e7]
        limit = LocalRate(policy, clock=lambda clock=clock: clock[0])  # type: ignore[misc]
        for _ in range(1000):
            clock[0] += limit.acquire() + 1e-8
            limit.acquire()
        wait = limit.acquire()
        assert wait > 0
        clock[0] += wait + 1e-8
        assert limit.acquire() == 0.0


def test_threads_get_no_permit_more() -> None:
    """However often they are switched."""
    limit, admitted = LocalRate(TokenBucket(1, per=1000, burst=500)), []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def take() -> None:
        for _ in range(300):
            if limit.acquire() == 0.0:
                admitted.append(1)

    try:
        threads = [threading.Thread(target=take) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(before)
    assert len(admitted) == 500


def test_keys_that_are_not_used_are_forgotten() -> None:
    """A bucket that is full again says nothing."""
    clock = Clock()
    limit = LocalRate(TokenBucket(10, per=1), clock=clock)
    for key in range(20_000):
        clock.us += 1000
        assert limit.acquire_for(key) == 0.0
    buckets = next(
        cell.cell_contents
        for cell in limit.acquire_for.__closure__ or ()
        if isinstance(cell.cell_contents, dict)  # type: ignore[attr-defined]
    )
    assert len(buckets) < 1200


@pytest.mark.parametrize("cost", [0, -1, inf, float("nan"), True, "2"])
def test_a_cost_that_is_none_is_refused(cost: Any) -> None:
    """With what to give."""
    limit = LocalRate(TokenBucket(10))
    if cost is True:  # is equal to one, and costs one
        assert limit.acquire(cost) == 0.0
        return
    with pytest.raises(ConfigurationError, match="is none; give a number above 0"):
        limit.acquire(cost)
    with pytest.raises(ConfigurationError, match="is none; give a number above 0"):
        limit.acquire_for("key", cost)


def test_only_buckets_are_counted_here() -> None:
    """With the way out."""
    with pytest.raises(ConfigurationError, match=r"SlidingLog.* is no bucket; give TokenBucket"):
        LocalRate(SlidingLog(3))  # type: ignore[arg-type]
