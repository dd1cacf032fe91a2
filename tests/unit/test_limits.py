"""The rates as pure functions: what holds for any numbers. What they answer to given ones is in ``tests/contracts``."""

from __future__ import annotations

import copy
import json
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskguard.clock import from_us, to_us
from taskguard.limits import rates
from taskguard.limits.rates import Terms, decide, room, terms_of
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket

NOW = to_us(1_790_000_000.123456)
EVERY: tuple[type[Rate], ...] = (TokenBucket, LeakyBucket, FixedWindow, SlidingWindow, SlidingLog)
every = pytest.mark.parametrize("rate", EVERY)

numbers = st.one_of(st.integers(1, 1000).map(float), st.floats(1, 1000))
periods = st.one_of(st.sampled_from([0.001, 0.1, 1 / 3, 1.0, 60.0, 86400.0, 366 * 86400.0]), st.floats(0.002, 1e6))
costs = st.one_of(st.just(1.0), st.floats(0.001, 20))
steps = st.lists(st.tuples(costs, st.floats(0, 1.5)), min_size=1, max_size=25)


def declared(rate: type[Rate], limit: float, period: float, burst: float) -> Terms:
    """The numbers of a rate that may be declared; *burst* is for a bucket."""
    limit = min(limit, 1e5 * period * 9) if limit / period > 9e5 else limit
    policy = TokenBucket(limit, period, burst) if rate is TokenBucket else rate(max(limit, 1.0), max(period, 0.002))
    return terms_of(policy)


@every
@given(limit=numbers, period=periods, burst=numbers, moves=steps)
@settings(max_examples=300)
def test_a_wait_is_exact_for_any_numbers(
    rate: type[Rate], limit: float, period: float, burst: float, moves: list[tuple[float, float]]
) -> None:
    """After the told wait the call goes; a microsecond earlier it does not, and is told to wait one.

    Ten of them, where the period is longer than eleven days: a thousandth of a permit is lost in rounding before.
    """
    terms, state, now = declared(rate, limit, period, burst), None, NOW
    early = 1 if terms.period <= 1e12 else 10
    for cost, pause in moves:
        verdict = decide(terms, state, now, cost)
        if verdict.wait is None:
            assert cost > terms.most
            continue
        if verdict.wait:
            assert verdict.wait == int(verdict.wait) > 0
            assert verdict.state is None
            assert 0 < (decide(terms, state, now + verdict.wait - early, cost).wait or 0) <= early
            now += verdict.wait
            verdict = decide(terms, state, now, cost)
        assert verdict.wait == 0
        assert verdict.state is not None
        state = verdict.state
        now += round(pause * terms.interval)


@pytest.mark.parametrize(
    ("policy", "state", "now", "cost", "wait"),
    [
        (SlidingWindow(54.76, per=3600), (59112000000000.0, 38.0, 40.0), 59113720322338.0, 0.1, 380277662),
        (SlidingWindow(172, per=39.9), (56163101100000.0, 157.0, 56.0), 56163105862862.0, 0.3, 24663388),
        (SlidingWindow(3.26, per=86400), (54000000000000.0, 1.0, 3.0), 54042261664213.0, 1.0, 7850335787),
    ],
    ids=str,
)
def test_a_wait_that_rounding_would_lengthen_is_asked_of_the_rule(
    policy: Rate, state: tuple[float, ...], now: float, cost: float, wait: int
) -> None:
    """A quotient a billionth above a whole number is that number."""
    terms = terms_of(policy)
    assert decide(terms, state, now, cost).wait == wait
    assert decide(terms, state, now + wait, cost).wait == 0


WHOLE = 2.0**52
"""Microseconds to an instant in the year 2167. Beyond twice of it doubles skip whole ones, and no wait ends."""


def spent(terms: Terms, moves: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Who asks as told, and now and then later: the instants and costs that were admitted."""
    state, now, got = None, NOW, []
    for cost, pause in moves * 4:
        if now > WHOLE:
            break
        cost = min(cost, terms.most)
        while wait := decide(terms, state, now, cost).wait:
            now += wait
        state = decide(terms, state, now, cost).state
        got.append((now, cost))
        now += round(pause * terms.interval) if pause > 1 else 0
    return got


@given(limit=numbers, period=periods, burst=numbers, moves=steps)
@settings(max_examples=200)
def test_a_bucket_never_exceeds_its_envelope(
    limit: float, period: float, burst: float, moves: list[tuple[float, float]]
) -> None:
    """In any window, from any call to any later one: burst + limit * window, and not a thousandth of a permit more."""
    terms = declared(TokenBucket, limit, period, burst)
    got = spent(terms, moves)
    for first, (began, _) in enumerate(got):
        total = 0.0
        for at, cost in got[first:]:
            total += cost
            assert total <= terms.burst + (at - began) / terms.interval + 1e-3 * min(1, terms.burst) + 1e-9 * total


@given(limit=st.integers(1, 30), period=periods, moves=steps)
@settings(max_examples=200)
def test_a_log_never_exceeds_its_limit_in_any_window(
    limit: int, period: float, moves: list[tuple[float, float]]
) -> None:
    """Exact, wherever the window begins."""
    terms = declared(SlidingLog, limit, period, 1)
    got = spent(terms, moves)
    for at, _ in got:
        assert sum(cost for when, cost in got if at <= when < at + terms.period) <= terms.limit + 1e-9


@given(limit=st.integers(1, 30), period=periods, moves=steps)
@settings(max_examples=200)
def test_a_fixed_window_never_exceeds_its_limit_in_its_windows(
    limit: int, period: float, moves: list[tuple[float, float]]
) -> None:
    """Nor twice of it in any other."""
    terms = declared(FixedWindow, limit, period, 1)
    got = spent(terms, moves)
    windows: dict[float, float] = {}
    for at, cost in got:
        index = (at + rates.SINCE_1970) // terms.period
        windows[index] = windows.get(index, 0.0) + cost
    assert max(windows.values()) <= terms.limit + 1e-9
    for at, _ in got:
        assert sum(cost for when, cost in got if at <= when < at + terms.period) <= 2 * terms.limit + 1e-9


@pytest.mark.parametrize("burst", [1, 2, 3, 7, 10, 49, 100, 1000, 12_345])
@pytest.mark.parametrize("rate", [1, 3, 7, 30, 49, 1000.1, 99_999])
def test_as_many_at_once_as_the_burst(burst: int, rate: float) -> None:
    """Seven sevenths are one, whatever they add up to in binary: the last of the burst goes, and not one more."""
    terms, state = terms_of(TokenBucket(rate, per=3, burst=burst)), None
    for _ in range(burst):
        verdict = decide(terms, state, NOW, 1.0)
        assert verdict.wait == 0
        state = verdict.state
    assert decide(terms, state, NOW, 1.0).wait


@every
@given(moves=steps)
def test_a_state_survives_json_and_is_never_changed_in_place(
    rate: type[Rate], moves: list[tuple[float, float]]
) -> None:
    """Stores that keep text read exactly what was written, and a decision that is thrown away leaves nothing."""
    terms, state, now = declared(rate, 3, 1, 3), None, NOW
    for cost, pause in moves:
        read = None if state is None else tuple(json.loads(json.dumps(state)))
        kept = copy.deepcopy(read)
        verdict = decide(terms, state, now, cost)
        again = decide(terms, read, now, cost)
        assert read == kept
        assert (again.wait, again.until) == (verdict.wait, verdict.until)
        assert room(terms, read, now) == room(terms, state, now)
        state = verdict.state or state
        now += round(pause * terms.interval)


@every
@given(moves=steps)
def test_a_state_says_nothing_after_its_end(rate: type[Rate], moves: list[tuple[float, float]]) -> None:
    """A store may forget it then: a limit without a state answers the same."""
    terms, state, now = declared(rate, 3, 1, 3), None, NOW
    for cost, pause in moves:
        verdict = decide(terms, state, now, cost)
        if verdict.wait == 0:
            state, later = verdict.state, ceil(verdict.until) + 1.0  # an instant is kept to a hundredth of one
            assert later > now
            for other in (0.5, terms.most):
                assert decide(terms, state, later, other) == decide(terms, None, later, other)
        now += round(pause * terms.interval)


@pytest.mark.parametrize(
    ("adapted", "expected"),
    [
        (50.0, ("bucket", 50.0, 10.0)),
        (200.0, ("bucket", 200.0, 40.0)),
        (0.5, ("bucket", 0.5, 1.0)),
    ],
)
def test_an_adapted_bucket_keeps_its_proportion(adapted: float, expected: tuple[str, float, float]) -> None:
    """A fifth of a second's permits at once, however many they are; one call at least."""
    terms = terms_of(TokenBucket(100, burst=20)).adapted(adapted)
    assert (terms.kind, terms.limit, terms.burst) == expected


def test_an_adapted_window_holds_one_call_at_least() -> None:
    """Less would stop everything for good."""
    terms = terms_of(FixedWindow(10)).adapted(0.2)
    assert (terms.limit, terms.most) == (1.0, 10.0)
    state = decide(terms, None, NOW, 5.0).state
    assert state is not None, "a cost that was possible stays possible, alone"
    assert decide(terms, state, NOW, 1.0).wait


@given(us=st.integers(-(10**15), 10**15))
def test_instants_are_whole_microseconds(us: int) -> None:
    """There and back, to the microsecond that an epoch second as a double can tell."""
    assert to_us(from_us(float(us))) == us
