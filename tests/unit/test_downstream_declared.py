"""What a downstream is made of, where its permits come from, and what it says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from taskguard.downstream.service import Downstream, use
from taskguard.errors import BulkheadFullError, CircuitOpenError, ConfigurationError, RateLimitedError
from taskguard.policies import (
    CircuitBreaker,
    Default,
    Fallback,
    FixedWindow,
    Limit,
    Retry,
    Timeout,
    TokenBucket,
)
from taskguard.stores.memory import MemoryPermits
from tests.unit.permithouse import PermitHouse


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


def test_the_application_says_which_store(permits: PermitHouse, caplog: pytest.LogCaptureFixture) -> None:
    """Late: a downstream made and used before asks the new store from then on. None: memory, with one warning."""
    bank = Downstream("late", rate=FixedWindow(1, per=60), circuit=CircuitBreaker())
    try:
        use(None)
        bank.call(lambda: None)
        Downstream("later", rate=FixedWindow(1)).call(lambda: None)
        assert caplog.text.count("no permit store is set") == 1
        use(lambda: permits.store)
        bank.call(lambda: None)
        assert permits.store.asked["admit"] == 1
        with pytest.raises(RateLimitedError):
            bank.call(lambda: None)
    finally:
        use(None)


def test_the_store_may_be_a_url() -> None:
    """All who name it share its desk."""
    one, other = (Downstream("by-url", concurrency=1, store="memory://") for _ in range(2))
    assert one.desk is other.desk
    with one.permit(covers=False), pytest.raises(BulkheadFullError):
        other.call(lambda: None)


def test_an_async_function_given_to_call_is_refused(permits: PermitHouse) -> None:
    """It would have ended before it began."""

    async def answer() -> int:
        return 1

    with pytest.raises(ConfigurationError, match="use acall"):
        permits.downstream(timeout=5).call(answer)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rate": 5}, "5 limits nothing"),
        ({"rate": "40/second"}, "is text, which only rules are written in; give TokenBucket"),
        ({"rate": []}, "an empty rate"),
        ({"rate": [TokenBucket(1), TokenBucket(2)]}, "two limits are called"),
        ({"concurrency": 0}, "Concurrency.limit: 0"),
        ({"concurrency": "5"}, "is no Concurrency"),
        ({"circuit": Retry()}, "is no CircuitBreaker"),
        ({"timeout": -1}, "timeout"),
        ({"retry": 3}, "is no Retry"),
        ({"fallback": Default(1)}, "is no Fallback"),
        ({"on_store_down": "deny"}, "choose one of 'allow', 'refuse'"),
        ({"cost": 0}, "cost 0 must be a number, more than 0"),
        ({"cost": -1}, "cost -1 must be a number, more than 0"),
        ({"cost": True}, "cost True must be a number, more than 0"),
        ({"cost": float("nan")}, "cost"),
        ({"max_wait": -1}, "max_wait"),
    ],
)
def test_a_mistake_is_told_where_it_is_made(options: dict[str, Any], complaint: str) -> None:
    """At import, with the value and the way out."""
    with pytest.raises(ConfigurationError, match=complaint):
        Downstream("bank", store=MemoryPermits(), **options)


def test_a_key_that_names_no_argument_is_a_mistake() -> None:
    """All calls would share it."""
    with pytest.raises(ConfigurationError, match="names no argument"):
        Limit(TokenBucket(1), key="tenant")


@pytest.mark.parametrize("name", ["", " bank", "ba\nnk", 5])
def test_a_downstream_needs_a_name(name: Any) -> None:
    """A word that people can read in a list."""
    with pytest.raises(ConfigurationError, match="is no name"):
        Downstream(name)


def test_what_is_declared_and_how_it_stands_is_explained(permits: PermitHouse) -> None:
    """One line a part, in the order in which it is asked."""
    bank = permits.downstream(
        rate=[TokenBucket(100, per=1), FixedWindow(1000, per=3600)],
        concurrency=10,
        circuit=CircuitBreaker(minimum_calls=1),
        timeout=Timeout(connect=3, read=10, total=15),
        retry=Retry(max_retries=2),
        fallback=Fallback(Default(None), on=CircuitOpenError),
    )
    bank.call(lambda: None)
    lines = [line.split(":")[0].split(" ")[0] for line in bank.explain()]
    assert lines == ["downstream", "fallback", "circuit", "rate", "rate", "rates", "bulkhead", "retry", "timeout"]
    with pytest.raises(ZeroDivisionError):
        bank.call(lambda: 1 / 0)
    assert bank.explain()[2].startswith("circuit: open (1 of 2 calls failed), asked again in 30 s; here 1 failed")


def test_the_figures_are_named_as_the_metrics_are(permits: PermitHouse) -> None:
    """Every pattern has its count, and durations are kept as a histogram."""
    bank = permits.downstream(rate=FixedWindow(2, per=60), circuit=CircuitBreaker(minimum_calls=100))
    bank.call(lambda: None)
    with pytest.raises(ZeroDivisionError):
        bank.call(lambda: 1 / 0)
    with pytest.raises(RateLimitedError):
        bank.call(lambda: None)
    stats = bank.stats()
    assert (stats.rate_limit_total, stats.rate_limit_rejected_total) == (3, 1)
    assert (stats.circuit_breaker_state, stats.circuit_breaker_success_total) == ("closed", 1)
    assert (stats.circuit_breaker_failures_total, stats.request_duration_seconds_count) == (1, 2)
    assert stats.request_duration_seconds_buckets[-1] == (float("inf"), 2)
    assert stats.bulkhead_available_permits is None


def test_a_block_needs_a_cost_where_the_cost_is_a_function(permits: PermitHouse) -> None:
    """There are no arguments to make it of."""
    bank = permits.downstream(rate=TokenBucket(5), cost=len)
    with pytest.raises(ConfigurationError, match="give permit"):
        bank.permit()
    with bank.permit(cost=2):
        pass
