"""How each algorithm reckons, by hand-written expectations, on every backend."""

from __future__ import annotations

import math

import pytest

from taskguard.errors import ConfigurationError
from taskguard.permits import Ask, RateAsk, RateView
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.ports import PermitStore
from tests.contracts.permits import EVERY_RATE, MicroClock, admitted, at_once, kind, take, wait_us

every_rate = pytest.mark.parametrize("policy", EVERY_RATE, ids=kind)


@every_rate
def test_a_permit_that_was_given_is_gone(permits: PermitStore, policy: Rate) -> None:
    """N at once from an unused limit are N: not N + 1, and not for ever. A leaky bucket is paced: one."""
    assert at_once(permits, policy) == (1 if isinstance(policy, LeakyBucket) else 3)


@every_rate
def test_idle_time_saves_up_no_more_than_the_limit(permits: PermitStore, micros: MicroClock, policy: Rate) -> None:
    """A limit that nobody used for long admits as many as a new one, and the idle time is not credited twice."""
    first = at_once(permits, policy)
    micros.advance(100_000)
    assert at_once(permits, policy) == first
    micros.advance(1e-6)
    assert at_once(permits, policy) == 0


def test_a_bucket_gets_its_permits_back_one_by_one(permits: PermitStore, micros: MicroClock) -> None:
    """Three in ten seconds: one after 3.333334 s, the second after 6.666667 s, not all after ten."""
    policy = TokenBucket(3, per=10)
    assert at_once(permits, policy) == 3
    micros.advance(us=3_333_333)
    assert at_once(permits, policy) == 0
    micros.advance(us=1)
    assert at_once(permits, policy) == 1
    micros.advance(us=3_333_333)
    assert at_once(permits, policy) == 1


def test_parts_of_a_second_are_credited(permits: PermitStore, micros: MicroClock) -> None:
    """Calls at odd moments do not lose the fraction that had come back when they were made."""
    policy = TokenBucket(1, per=1, burst=2)
    assert at_once(permits, policy) == 2
    micros.advance(1.5)
    assert at_once(permits, policy) == 1
    micros.advance(0.5)
    assert at_once(permits, policy) == 1
    micros.advance(0.999999)
    assert at_once(permits, policy) == 0
    micros.advance(us=1)
    assert at_once(permits, policy) == 1


@every_rate
def test_a_refused_call_changes_nothing(permits: PermitStore, micros: MicroClock, policy: Rate) -> None:
    """However often it is asked meanwhile, a call is admitted when it was told, and not before."""
    at_once(permits, policy)
    wait = wait_us(take(permits, policy))
    for _ in range(9):
        micros.advance(us=wait // 10)
        answer = take(permits, policy)
        assert wait_us(answer) == wait - micros.passed
    micros.advance(us=wait - micros.passed)
    assert admitted(take(permits, policy))


@every_rate
def test_a_refused_cost_is_not_spent(permits: PermitStore, policy: Rate) -> None:
    """A call that needs more than is left takes nothing of it."""
    assert admitted(take(permits, policy))
    assert not admitted(take(permits, policy, cost=3))
    assert at_once(permits, policy) == (0 if isinstance(policy, LeakyBucket) else 2)


@every_rate
def test_waiting_as_told_admits_and_a_microsecond_less_does_not(
    permits: PermitStore, micros: MicroClock, policy: Rate
) -> None:
    """Whatever was spent before, and whatever the call costs."""
    micros.advance(us=1_234_567)
    for step, cost in enumerate([1, 2, 0.5, 3, 1, 0.7, 2.3, 1, 1, 3]):
        answer = take(permits, policy, cost)
        if not admitted(answer):
            micros.advance(us=wait_us(answer) - 1)
            assert wait_us(take(permits, policy, cost)) == 1
            micros.advance(us=1)
            assert admitted(take(permits, policy, cost)), (step, cost)
        micros.advance(us=step * 77_777)


@pytest.mark.parametrize(
    ("policy", "cost"),
    [
        (TokenBucket(100, per=1, burst=20), 21),
        (LeakyBucket(3, per=10), 3.5),
        (FixedWindow(3, per=10), 4),
        (SlidingWindow(3, per=10), 4),
        (SlidingLog(3, per=10), 3.001),
    ],
    ids=str,
)
def test_a_cost_over_what_can_ever_be_admitted_is_refused_for_good(
    permits: PermitStore, policy: Rate, cost: float
) -> None:
    """No wait is told, because none helps; nothing is booked, and nothing is taken."""
    answer = take(permits, policy, cost, book=True)
    assert not admitted(answer)
    assert (answer.retry_after, answer.slot_in) == (None, None)  # type: ignore[union-attr]
    assert admitted(take(permits, policy, policy.most))


@pytest.mark.parametrize("cost", [0, -1, math.nan, math.inf, True, "1", None], ids=str)
def test_a_cost_that_is_none_is_refused_where_it_is_declared(cost: object) -> None:
    """Zero would admit without end, less would give permits back, and nothing compares with nan."""
    with pytest.raises(ConfigurationError, match=r"limit bank: a cost of .* is none; give a number above 0"):
        RateAsk("bank", TokenBucket(1), cost)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy",
    [TokenBucket(0.3, burst=1), TokenBucket(7, per=3, burst=1), TokenBucket(300_000, burst=50), LeakyBucket(0.7)],
    ids=str,
)
def test_the_long_run_rate_is_the_declared_one(permits: PermitStore, micros: MicroClock, policy: Rate) -> None:
    """Below one a second, above 100,000, and where no number divides another: within a thousandth."""
    calls = 500
    while admitted(answer := take(permits, policy)):
        pass
    micros.advance(us=wait_us(answer))
    began, count = micros.passed, 0
    while count < calls:
        answer = take(permits, policy)
        if admitted(answer):
            count += 1
        else:
            micros.advance(us=wait_us(answer))
    assert micros.passed - began == pytest.approx((calls - 1) * policy.interval * 1e6, rel=1e-3)


def test_a_leaky_bucket_is_paced_by_what_calls_cost(permits: PermitStore, micros: MicroClock) -> None:
    """Two permits a second: a call of cost 2 keeps the next one a second away."""
    policy = LeakyBucket(2)
    assert admitted(take(permits, policy, cost=2))
    assert wait_us(take(permits, policy)) == 1_000_000
    micros.advance(1)
    assert admitted(take(permits, policy))
    assert wait_us(take(permits, policy, cost=2)) == 500_000


def test_a_fixed_window_admits_two_limits_across_an_edge(permits: PermitStore, micros: MicroClock) -> None:
    """As documented: exact in each window, double in the worst ten seconds. Windows begin at multiples since 1970."""
    policy = FixedWindow(3, per=10)
    micros.advance(9.999_999)
    assert at_once(permits, policy) == 3
    assert wait_us(take(permits, policy)) == 1
    micros.advance(us=1)
    assert at_once(permits, policy) == 3
    assert wait_us(take(permits, policy)) == 10_000_000


def test_a_sliding_window_lets_the_last_one_fade(permits: PermitStore, micros: MicroClock) -> None:
    """Ten used before the edge count as nine a tenth into the next window, as five in its middle."""
    policy = SlidingWindow(10, per=10)
    micros.advance(9.9)
    assert at_once(permits, policy) == 10
    assert wait_us(take(permits, policy)) == 1_100_000
    micros.advance(0.1)
    assert at_once(permits, policy) == 0
    micros.advance(1)
    assert at_once(permits, policy) == 1
    micros.advance(4)
    assert at_once(permits, policy) == 4
    micros.advance(15)
    assert at_once(permits, policy) == 10, "both windows are over"


def test_a_sliding_window_errs_by_less_than_a_limit(permits: PermitStore, micros: MicroClock) -> None:
    """Bunched just before an edge, as documented: never more than twice the limit in any ten seconds."""
    policy = SlidingWindow(10, per=10)
    micros.advance(9.9)
    times = [micros.passed] * at_once(permits, policy)
    for _ in range(300):
        micros.advance(0.1)
        times += [micros.passed] * at_once(permits, policy)
    worst = max(sum(1 for other in times if at <= other < at + 10_000_000) for at in times)
    assert 10 < worst < 20


def test_a_sliding_log_is_exact_in_every_window(permits: PermitStore, micros: MicroClock) -> None:
    """Whenever asked, never more than the limit within any ten seconds, and each comes back when its own are over."""
    policy = SlidingLog(4, per=10)
    times = []
    for step in [0, 9.5, 0.4, 0.1, 0.000001, 3, 6.4, 0.1, 0.1, 9.9, 0.1, 20]:
        micros.advance(step)
        times += [micros.passed] * at_once(permits, policy)
    assert max(sum(1 for other in times if at <= other < at + 10_000_000) for at in times) == 4
    assert at_once(permits, policy) == 0
    assert wait_us(take(permits, policy, cost=4)) == 10_000_000


@every_rate
def test_a_clock_that_is_set_back_neither_resets_nor_freezes_a_limit(
    permits: PermitStore, micros: MicroClock, policy: Rate
) -> None:
    """After a failover to a server an hour behind, what was used is still used, for one period at most."""
    at_once(permits, policy)
    micros.advance(-3600)
    wait = wait_us(take(permits, policy))
    assert 0 < wait <= 20_000_000
    micros.advance(us=wait)
    assert admitted(take(permits, policy))


@every_rate
def test_processes_that_disagree_about_the_clock_do_not_reset_a_limit(
    permits: PermitStore, micros: MicroClock, policy: Rate
) -> None:
    """One reads the server's clock 5 ms later than the other, across the edge of a window: no permit is given twice."""
    micros.advance(10.001)
    count = at_once(permits, policy)
    for _ in range(5):
        micros.advance(-0.005)
        assert at_once(permits, policy) == 0
        micros.advance(0.005)
        assert at_once(permits, policy) == 0
    assert count == (1 if isinstance(policy, LeakyBucket) else 3)


def test_a_limit_that_was_made_wider_does_not_wait_for_the_old_one(permits: PermitStore, micros: MicroClock) -> None:
    """One an hour, used up, then declared as 100 a second: what was spent counts for a second, not for an hour."""
    assert at_once(permits, TokenBucket(1, per=3600)) == 1
    wait = wait_us(take(permits, TokenBucket(100)))
    assert 0 < wait <= 1_000_000
    micros.advance(us=wait)
    assert admitted(take(permits, TokenBucket(100)))


def test_limits_of_one_name_with_other_algorithms_are_apart(permits: PermitStore) -> None:
    """A state is never read by an algorithm that did not write it."""
    assert [at_once(permits, policy) for policy in EVERY_RATE] == [3, 0, 3, 3, 3]  # both buckets are one


@pytest.mark.parametrize("name", ["a:b", "a{b}c", "}{", "a b", "ä/ü", "", "x" * 300, "a\\b", "a\0b", "a\nb"], ids=repr)
def test_names_are_whatever_they_are(permits: PermitStore, name: str) -> None:
    """Braces, separators and spaces in a name end in no other limit's state."""
    policy = FixedWindow(1, per=10)
    assert admitted(take(permits, policy, name=name))
    assert not admitted(take(permits, policy, name=name))
    assert admitted(take(permits, policy, name=name + "x"))


@pytest.mark.parametrize(
    ("policy", "after_one", "after_two"),
    [
        (TokenBucket(3, per=10), (3, 2, 3.333334), (3, 1, 3.733333)),
        (LeakyBucket(3, per=10), (3, 0, 3.333334), None),
        (FixedWindow(3, per=10), (3, 2, 10.0), (3, 1, 7.066666)),
        (SlidingWindow(3, per=10), (3, 2, 20.0), (3, 1, 17.066666)),
        (SlidingLog(3, per=10), (3, 2, 10.0), (3, 1, 10.0)),
    ],
    ids=["TokenBucket", "LeakyBucket", "FixedWindow", "SlidingWindow", "SlidingLog"],
)
def test_an_answer_tells_limit_remaining_and_reset(
    permits: PermitStore,
    micros: MicroClock,
    policy: Rate,
    after_one: tuple[float, float, float],
    after_two: tuple[float, float, float] | None,
) -> None:
    """Permits of the limit, whole permits that are left, seconds until all are back. Two calls, 2.933334 s apart."""
    assert take(permits, policy).rates == (RateView("bank", *after_one),)
    micros.advance(2.933334)
    second = take(permits, policy)
    if after_two is None:
        assert not admitted(second)
        assert second.rates == (RateView("bank", 3, 0, 0.4),)
    else:
        assert second.rates == (RateView("bank", *after_two),)


def test_an_adaptive_limit_is_what_the_store_has_under_its_name(permits: PermitStore, micros: MicroClock) -> None:
    """Its burst shrinks and grows with it, down to one call; without a word about it the declaration stands."""

    def count(at: float) -> int:
        micros.advance(at)
        ask = Ask(rates=(RateAsk("bank", TokenBucket(20, burst=10), adaptive=True),))
        return next(n for n in range(50) if not admitted(permits.admit(ask)))

    assert count(0) == 10
    permits.adapt("bank", 10, why="too many 429s")
    assert count(100) == 5
    permits.adapt("bank", 0.5, why="still")
    assert count(100) == 1
    assert count(1.9) == 0
    assert count(0.1) == 1
    permits.adapt("bank", 40, why="all is well")
    assert count(100) == 20
    assert at_once(permits, TokenBucket(20, burst=10)) == 0, "undeclared, it is the same bucket by its own numbers"
