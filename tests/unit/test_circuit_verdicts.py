"""What a circuit takes for a failure, and whose word stands above what it counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from taskguard.downstream.circuit import judge
from taskguard.errors import CircuitOpenError, DownstreamTimeout, RateLimitedError
from taskguard.policies import CircuitBreaker, Retry
from tests.unit.permithouse import PermitHouse

BREAKER = CircuitBreaker(minimum_calls=4, failure_rate_threshold=0.5, wait_in_open=30, max_wait_in_open=600)


class Unwell(Exception):
    """What the downstream raises."""


def fail(*_: Any) -> None:
    raise Unwell("500")


def trip(bank: Any, times: int = 4) -> None:
    for _ in range(times):
        with pytest.raises(Unwell):
            bank.call(fail)


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


def test_what_the_circuit_ignores_is_not_counted(permits: PermitHouse) -> None:
    """Trap 36: excluded exceptions, and what ends the caller, are neither failures nor successes."""
    policy = CircuitBreaker(expected=(ConnectionError,), ignored=(BrokenPipeError,))
    soft_limit = type("SoftTimeLimitExceeded", (Exception,), {})
    predicate = type("TaskPredicate", (Exception,), {"exc": None})
    verdicts = {
        "expected": judge(policy, ConnectionResetError()),
        "ignored": judge(policy, BrokenPipeError()),
        "an answer": judge(policy, ValueError()),
        "exit": judge(policy, SystemExit()),
        "generator": judge(policy, GeneratorExit()),
        "cancelled": judge(policy, asyncio.CancelledError()),
        "soft limit": judge(CircuitBreaker(), soft_limit()),
        "retry": judge(CircuitBreaker(), predicate()),
        "refused": judge(CircuitBreaker(), RateLimitedError("no")),
        "too late": judge(policy, DownstreamTimeout("late")),
        "unexpected": judge(CircuitBreaker(), ValueError()),
    }
    assert verdicts == {
        "expected": "failure",
        "ignored": "ignored",
        "an answer": "success",
        "exit": "ignored",
        "generator": "ignored",
        "cancelled": "ignored",
        "soft limit": "ignored",
        "retry": "ignored",
        "refused": "ignored",
        "too late": "failure",
        "unexpected": "failure",
    }


def test_a_retry_of_a_task_is_judged_by_its_reason() -> None:
    """Celery's Retry carries the error it is for; that error counts."""
    retry = type("TaskPredicate", (Exception,), {"exc": ConnectionError()})
    assert judge(CircuitBreaker(), retry()) == "failure"


def test_a_generator_is_judged_when_it_ends(permits: PermitHouse) -> None:
    """Trap 36: a failure between two items counts; a reader that stops early says nothing."""
    bank = permits.downstream(circuit=BREAKER)

    @bank
    def rows(breaks: bool) -> Iterator[int]:
        yield 1
        if breaks:
            raise Unwell("half way")
        yield 2

    assert list(rows(False)) == [1, 2]
    with pytest.raises(Unwell):
        list(rows(True))
    reader = rows(True)
    next(reader)
    reader.close()
    stats = bank.stats()
    assert (stats.circuit_breaker_success_total, stats.circuit_breaker_failures_total) == (1, 1)


def test_an_operators_word_is_heard_and_ends_by_itself(permits: PermitHouse) -> None:
    """forced_open refuses with who and why; after its instant calls go again."""
    bank = permits.downstream(circuit=BREAKER)
    bank.call(lambda: None)
    until = permits.clock() + 60
    permits.store.force("bank", "forced_open", until=until, who="ada", why="maintenance")
    assert bank.circuit is not None
    bank.circuit.apply(permits.store.circuit("bank"))
    with pytest.raises(CircuitOpenError, match="ada: maintenance") as caught:
        bank.call(lambda: None)
    assert caught.value.retry_after == pytest.approx(60, abs=0.1)
    permits.clock.advance(61)
    assert bank.call(lambda: 5) == 5


@pytest.mark.parametrize("state", ["forced_closed", "disabled"])
def test_a_circuit_that_is_forced_closed_lets_failures_through(permits: PermitHouse, state: Any) -> None:
    """Nothing trips it, and nothing is told."""
    bank = permits.downstream(circuit=BREAKER)
    permits.store.force("bank", state, until=None, who="ada", why="drill")
    trip(bank, 10)
    assert bank.circuit is not None
    assert bank.circuit.state == state
    assert permits.store.asked["report"] == 0


def test_the_tries_of_one_call_are_one_outcome(permits: PermitHouse) -> None:
    """The circuit is round the retries: a call that fails three times and then goes well was a success."""
    bank = permits.downstream(
        circuit=BREAKER, retry=Retry(max_retries=3, first_delay=0.001, max_delay=0.001, retry_on=(Unwell,))
    )
    left = [3]

    def third_time() -> str:
        if left[0]:
            left[0] -= 1
            raise Unwell("500")
        return "well"

    assert bank.call(third_time) == "well"
    stats = bank.stats()
    assert (stats.circuit_breaker_success_total, stats.circuit_breaker_failures_total) == (1, 0)
    assert stats.retry_attempts_total == 3
