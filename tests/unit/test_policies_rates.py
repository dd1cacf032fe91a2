"""Rates as they are declared: what cannot work fails there, with the value and the way out."""

from __future__ import annotations

import math
import pickle
from datetime import timedelta

import pytest

from taskguard.errors import ConfigurationError
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket

EVERY: tuple[type[Rate], ...] = (TokenBucket, LeakyBucket, FixedWindow, SlidingWindow, SlidingLog)
every = pytest.mark.parametrize("rate", EVERY)


def refusal(rate: type[Rate], *args: object, **options: object) -> str:
    """What is said of a declaration that cannot work: one line."""
    with pytest.raises(ConfigurationError) as info:
        rate(*args, **options)  # type: ignore[arg-type]
    text = str(info.value)
    assert "\n" not in text
    return text


@every
def test_a_rate_is_permits_per_period(rate: type[Rate]) -> None:
    """A second unless said otherwise; durations of every kind; the interval is the long run's."""
    assert (rate(5).period, rate(5).interval) == (1.0, 0.2)
    assert rate(5, per=timedelta(minutes=1)) == rate(5, per=60) == rate(5, per="1m")
    assert rate(30, per="1m").interval == 2.0


@every
@pytest.mark.parametrize("limit", [-1, -0.5, math.nan, math.inf, True, "5", None], ids=str)
def test_a_limit_that_is_no_number_is_refused(rate: type[Rate], limit: object) -> None:
    """Nor does one below zero mean anything."""
    assert refusal(rate, limit) == f"{rate.__name__}.limit: {limit!r} must be a number, 0 or more"


@every
def test_a_limit_of_zero_says_how_calls_are_stopped(rate: type[Rate]) -> None:
    """Nobody limits to nothing on purpose without wanting a circuit."""
    assert refusal(rate, 0) == (
        f"{rate.__name__}.limit: 0 admits nothing; give more, or force the circuit open to stop calls"
    )


@every
@pytest.mark.parametrize("per", [0, 0.0009, 367 * 86400, "400d"], ids=str)
def test_a_period_is_a_millisecond_to_a_year(rate: type[Rate], per: object) -> None:
    """Below nothing is kept apart, and above a state would not end in anybody's time."""
    assert refusal(rate, 1, per=per) == f"{rate.__name__}.per: {per!r} is out of range; give 1 ms to 366 days"


@every
@pytest.mark.parametrize("per", [-1, math.nan, "soon", None, True], ids=str)
def test_a_period_that_is_no_duration_is_refused(rate: type[Rate], per: object) -> None:
    """The name of the option and the value are in the text."""
    assert refusal(rate, 1, per=per).startswith(f"{rate.__name__}.per: {per!r} is ")


@every
def test_a_rate_that_limits_nothing_is_refused(rate: type[Rate]) -> None:
    """Over a million a second no store could tell calls apart."""
    text = refusal(rate, 1_000_001)
    assert text == f"{rate.__name__}: 1e+06 per 1 s is over a million a second; that limits nothing"


def test_the_burst_is_the_limit_unless_it_is_given() -> None:
    """And one where the limit is less: a bucket that holds no call would admit none."""
    assert (TokenBucket(100).burst, TokenBucket(100, burst=20).burst) == (100.0, 20.0)
    assert (TokenBucket(0.5).burst, TokenBucket(0.5).most) == (1.0, 1.0)


@pytest.mark.parametrize("burst", [0, 0.99], ids=str)
def test_a_burst_below_one_is_refused(burst: float) -> None:
    """It would admit no call, ever."""
    text = refusal(TokenBucket, 100, burst=burst)
    assert text == f"TokenBucket.burst: {burst!r} admits no call at all; give 1 or more"


@pytest.mark.parametrize("burst", [-1, math.nan, math.inf, True, "3"], ids=str)
def test_a_burst_that_is_no_number_is_refused(burst: object) -> None:
    """As a limit is."""
    assert refusal(TokenBucket, 100, burst=burst) == f"TokenBucket.burst: {burst!r} must be a number, 0 or more"


@pytest.mark.parametrize("rate", [FixedWindow, SlidingWindow])
def test_a_window_must_hold_one_call(rate: type[Rate]) -> None:
    """Half a call a second is one in two."""
    assert refusal(rate, 0.5) == (
        f"{rate.__name__}.limit: 0.5 in each window admits no call; write the same rate with a longer per"
    )
    assert rate(1, per=2).most == 1


@pytest.mark.parametrize("limit", [0.5, 100_001])
def test_a_log_is_bounded(limit: float) -> None:
    """Each permit is remembered."""
    assert refusal(SlidingLog, limit, per=60) == f"SlidingLog.limit: {limit:g} is out of range; give 1 to 100000"


@pytest.mark.parametrize(
    ("policy", "most"),
    [
        (TokenBucket(100, burst=20), 20),
        (LeakyBucket(5), 5),
        (LeakyBucket(0.5), 1),
        (FixedWindow(5), 5),
        (SlidingWindow(5), 5),
        (SlidingLog(5), 5),
    ],
    ids=str,
)
def test_the_most_a_call_may_cost(policy: Rate, most: float) -> None:
    """More is refused for good; one call of cost 1 always fits."""
    assert policy.most == most


@every
def test_a_rate_is_a_value(rate: type[Rate]) -> None:
    """Equal, hashable, frozen, and sent to other processes."""
    policy = rate(3, per=10)
    assert pickle.loads(pickle.dumps(policy)) == policy == rate(3, per=10)
    assert hash(policy) == hash(rate(3, per=10))
    with pytest.raises(AttributeError):
        policy.limit = 4  # type: ignore[misc]
