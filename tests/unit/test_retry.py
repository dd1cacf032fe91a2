"""Retry decisions: bounds of the waits, the order of the questions, and the budget."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard.clock import seconds
from taskguard.policies import Budget, Retry
from taskguard.record import Reason
from taskguard.retry import BudgetKeeper, GiveUp, RetryIn, decide, delay
from tests.clocks import ManualClock

NOW = 1_700_000_000.0


class Refused(Exception):
    """An error that was told how long to wait, as client libraries carry it."""

    def __init__(self, retry_after: Any = None) -> None:
        super().__init__("refused")
        self.retry_after = retry_after
        self.status_code = 429


def ask(policy: Retry, exc: BaseException, **given_: Any) -> Any:
    return decide(policy, exc, **{"retries": 0, "previous": None, "now": NOW, "rng": random.Random(1)} | given_)


policies = st.builds(
    lambda backoff, first, factor, longest, jitter: Retry(
        backoff=backoff,
        first_delay=first,
        factor=factor,
        max_delay=max(first, longest),
        jitter="full" if (backoff, jitter) == ("fixed", "decorrelated") else jitter,
    ),
    st.sampled_from(["exponential", "fixed"]),
    st.floats(0, 1000),
    st.floats(1, 1e6),
    st.floats(0, 1e5),
    st.sampled_from(["full", "decorrelated", "none"]),
)


@given(policies, st.integers(0, 10_000), st.none() | st.floats(0, 1e6), st.integers())
def test_a_wait_is_never_negative_and_never_above_the_longest(
    policy: Retry, retries: int, previous: float | None, seed: int
) -> None:
    """Whatever the policy and however late the retry: 0 <= wait <= max_delay."""
    wait = delay(policy, retries=retries, previous=previous, rng=random.Random(seed))
    assert 0 <= wait <= seconds(policy.max_delay)


@given(st.floats(0.01, 100), st.integers(0, 30), st.integers())
def test_decorrelated_waits_start_at_the_first_delay_and_at_most_triple(first: float, steps: int, seed: int) -> None:
    """Brooker's ``min(cap, random_between(base, sleep * 3))``."""
    policy = Retry(first_delay=first, max_delay=first * 1000, jitter="decorrelated")
    rng, previous = random.Random(seed), None
    for retries in range(steps):
        wait = delay(policy, retries=retries, previous=previous, rng=rng)
        assert first <= wait <= min(first * 1000, 3 * (previous or first)) * (1 + 1e-9)
        previous = wait


def test_without_jitter_waits_double_up_to_the_longest() -> None:
    """The exponential curve itself."""
    policy = Retry(first_delay=1, factor=2, max_delay=10, jitter="none")
    assert [delay(policy, retries=n, previous=None) for n in (0, 1, 2, 3, 4, 5000)] == [1, 2, 4, 8, 10, 10]


def test_a_fixed_wait_without_jitter_stays_the_same() -> None:
    """What "fixed" says."""
    policy = Retry(backoff="fixed", first_delay=7, jitter="none")
    assert {delay(policy, retries=n, previous=None) for n in range(9)} == {7.0}


def test_no_first_delay_means_no_wait_however_late() -> None:
    """Nothing grows from zero."""
    assert delay(Retry(first_delay=0, jitter="none"), retries=5000, previous=None) == 0


def test_full_jitter_spreads_over_the_whole_range() -> None:
    """A thousand retries of one outage do not come back as one: mean and extremes of a uniform draw."""
    policy, rng = Retry(first_delay=8, jitter="full"), random.Random(7)
    draws = [delay(policy, retries=0, previous=None, rng=rng) for _ in range(2000)]
    assert 3.7 < sum(draws) / len(draws) < 4.3
    assert min(draws) < 0.1
    assert max(draws) > 7.9


def test_a_transient_error_is_retried_and_a_permanent_one_is_not() -> None:
    """The default classification decides where the policy says nothing."""
    assert isinstance(ask(Retry(), TimeoutError("slow")), RetryIn)
    answer = ask(Retry(), ValueError("bad iban"))
    assert answer == GiveUp(Reason.PERMANENT_ERROR, "ValueError: bad iban is not worth a retry")


def test_the_count_is_used_up_after_max_retries() -> None:
    """Celery's count: with 3 retries there are 4 runs."""
    assert isinstance(ask(Retry(max_retries=3), TimeoutError(), retries=2), RetryIn)
    answer = ask(Retry(max_retries=3), TimeoutError("slow"), retries=3)
    assert answer == GiveUp(Reason.MAX_RETRIES, "all 3 retries are used up; the last: TimeoutError: slow")
    assert ask(Retry(max_retries=0), TimeoutError()).reason is Reason.MAX_RETRIES
    assert isinstance(ask(Retry(max_retries=None), TimeoutError(), retries=10_000), RetryIn)


def test_a_permanent_error_is_called_that_even_on_the_last_try() -> None:
    """The reason in the dead letter is the one an operator must act on."""
    assert ask(Retry(max_retries=3), ValueError(), retries=3).reason is Reason.PERMANENT_ERROR


@pytest.mark.parametrize(
    ("policy", "exc", "retried"),
    [
        (Retry(retry_on=(KeyError,)), KeyError("x"), True),
        (Retry(retry_on=(LookupError,)), KeyError("x"), True),
        (Retry(retry_on=(KeyError,)), TimeoutError(), True),
        (Retry(dont_retry_on=(TimeoutError,)), TimeoutError(), False),
        (Retry(retry_on=(OSError,), dont_retry_on=(TimeoutError,)), TimeoutError(), False),
        (Retry(retry_on=(OSError,), dont_retry_on=(TimeoutError,)), PermissionError(), True),
        (Retry(retry_if=lambda exc: True), ValueError(), True),
        (Retry(retry_if=lambda exc: False), TimeoutError(), False),
        (Retry(retry_if=lambda exc: False, retry_on=(KeyError,)), KeyError(), False),
        (Retry(retry_if=lambda exc: True, dont_retry_on=(KeyError,)), KeyError(), False),
    ],
)
def test_the_policy_overrides_the_classification(policy: Retry, exc: BaseException, retried: bool) -> None:
    """dont_retry_on, then retry_if, then retry_on, then the default."""
    assert isinstance(ask(policy, exc), RetryIn) is retried


def test_a_retry_if_that_fails_does_not_hide_the_tasks_own_error() -> None:
    """A bug in the predicate dead-letters the task with both errors named."""
    answer = ask(Retry(retry_if=lambda exc: exc.response.status_code == 503), TimeoutError("slow"))  # type: ignore[attr-defined]
    assert answer.reason is Reason.PERMANENT_ERROR
    assert "retry_if raised AttributeError" in answer.why
    assert "TimeoutError: slow" in answer.why


def test_retry_after_is_the_least_wait() -> None:
    """A longer backoff stands, a shorter one is raised to what was asked."""
    short, long = (Retry(first_delay=d, jitter="none") for d in (1, 50))
    assert ask(short, Refused(30)) == RetryIn(30.0)
    assert ask(long, Refused(30)) == RetryIn(50.0)


def test_retry_after_is_bounded_and_can_be_ignored() -> None:
    """A server that asks for a day does not park the task for a day."""
    assert ask(Retry(jitter="none"), Refused(86_400)) == RetryIn(3600.0)
    assert ask(Retry(jitter="none", max_retry_after=60), Refused(86_400)) == RetryIn(60.0)
    assert ask(Retry(jitter="none", retry_after=False), Refused(30)) == RetryIn(1.0)


@given(st.sampled_from(["full", "decorrelated"]), st.integers())
def test_those_told_the_same_moment_do_not_all_return_at_it(jitter: Any, seed: int) -> None:
    """With jitter, the wait is drawn on top of what was asked, and never below it."""
    answer = ask(Retry(jitter=jitter, first_delay=4), Refused(30), rng=random.Random(seed))
    assert 30 <= answer.delay <= 30 + 12


def test_a_budget_allows_its_reserve_and_a_share_of_first_tries() -> None:
    """10 s at 0.1 per second are 1 retry; 20 first tries at 0.2 are 4 more."""
    keeper = BudgetKeeper(Budget(ratio=0.2, min_per_second=0.1, window=10), clock=ManualClock())
    for _ in range(20):
        keeper.record_try()
    assert [keeper.spend() for _ in range(6)] == [True] * 5 + [False]


def test_a_budget_forgets_what_is_older_than_its_window(clock: ManualClock) -> None:
    """Spent retries come back and unspent first tries are gone when the window has passed."""
    keeper = BudgetKeeper(Budget(ratio=1, min_per_second=0.2, window=10), clock=clock)
    assert [keeper.spend() for _ in range(3)] == [True, True, False]
    clock.advance(8)
    assert not keeper.spend()
    clock.advance(3)
    keeper.record_try()
    assert [keeper.spend() for _ in range(4)] == [True, True, True, False]
    clock.advance(1000)
    assert [keeper.spend() for _ in range(3)] == [True, True, False]


def test_only_first_tries_within_the_window_count(clock: ManualClock) -> None:
    """A first try each second for a minute: the last ten allow five retries at a half."""
    keeper = BudgetKeeper(Budget(ratio=0.5, min_per_second=0, window=10), clock=clock)
    for _ in range(60):
        clock.advance(1)
        keeper.record_try()
    assert [keeper.spend() for _ in range(6)] == [True] * 5 + [False]


@given(
    st.floats(0, 1),
    st.floats(0.1, 2),
    st.lists(st.tuples(st.floats(0, 4), st.booleans()), max_size=200),
)
def test_retries_in_a_window_never_exceed_the_budget(
    ratio: float, rate: float, steps: list[tuple[float, bool]]
) -> None:
    """Over every window that ends with a granted retry: retries <= reserve + ratio * first tries."""
    clock, window = ManualClock(), 10.0
    keeper = BudgetKeeper(Budget(ratio=ratio, min_per_second=rate, window=window), clock=clock)
    tries: list[float] = []
    granted: list[float] = []
    for pause, is_try in steps:
        clock.advance(pause)
        if is_try:
            keeper.record_try()
            tries.append(clock.at)
        elif keeper.spend():
            granted.append(clock.at)
            # The count is kept in ten slices, so the oldest may be partly forgotten.
            recent = [at for at in granted if at > clock.at - window * 0.9]
            allowed = rate * window + ratio * sum(at > clock.at - window for at in tries)
            assert len(recent) <= allowed + 1e-6


def test_a_budget_is_counted_once_by_many_threads() -> None:
    """Threads of one pool share the budget: no retry is granted twice."""
    keeper = BudgetKeeper(Budget(ratio=0, min_per_second=10, window=10), clock=ManualClock())
    granted: list[bool] = []

    def spend_fifty() -> None:
        granted.extend(keeper.spend() for _ in range(50))

    threads = [threading.Thread(target=spend_fifty) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert granted.count(True) == 100


def test_an_empty_budget_gives_up_and_only_then_is_it_asked() -> None:
    """A permanent error and a used-up count cost no budget."""
    keeper = BudgetKeeper(Budget(ratio=0, min_per_second=0.1, window=10), clock=ManualClock())
    ask(Retry(), ValueError(), budget=keeper)
    ask(Retry(), TimeoutError(), retries=3, budget=keeper)
    assert isinstance(ask(Retry(), TimeoutError(), budget=keeper), RetryIn)
    answer = ask(Retry(), TimeoutError("slow"), budget=keeper)
    assert answer == GiveUp(Reason.MAX_RETRIES, "the retry budget is used up; the last: TimeoutError: slow")
