"""Retries inside a call, and the time a try may take."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from taskguard.downstream import timeouts
from taskguard.errors import CircuitOpenError, ConfigurationError, DownstreamTimeout, RateLimitedError
from taskguard.policies import Budget, CircuitBreaker, FixedWindow, Retry, RetryEvent, Timeout
from tests.unit.permithouse import PATIENCE, PermitHouse


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, times: int, error: type[BaseException] | BaseException = ConnectionError) -> None:
        self.times, self.error = times, error
        self.calls = 0

    def __call__(self, *_: Any) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls

    async def later(self, *_: Any) -> int:
        return self()


QUICK = Retry(max_retries=3, first_delay=0.001, max_delay=0.002)


@pytest.mark.parametrize("mode", ["call", "decorated", "acall"])
def test_what_may_go_well_is_tried_again(permits: PermitHouse, mode: str) -> None:
    """Transient errors only, as often as declared, in every way to call."""
    bank = permits.downstream(retry=QUICK)

    def run(flaky: Flaky) -> int:
        match mode:
            case "call":
                return bank.call(flaky)
            case "decorated":
                return bank(lambda: flaky())()
            case _:
                return asyncio.run(bank.acall(flaky.later))

    assert run(Flaky(3)) == 4
    exhausted, permanent = Flaky(9), Flaky(1, ValueError)
    with pytest.raises(ConnectionError):
        run(exhausted)
    with pytest.raises(ValueError):
        run(permanent)
    assert (exhausted.calls, permanent.calls) == (4, 1)
    stats = bank.stats()
    assert (stats.retry_attempts_total, stats.retry_exhausted_total) == (6, 1)


def test_an_error_that_iterators_use_comes_out_as_it_is(permits: PermitHouse) -> None:
    """StopIteration is an error like another here, not the end of a machine inside."""
    for retry in (None, QUICK):
        with pytest.raises(StopIteration):
            permits.downstream(retry=retry, timeout=5).call(Flaky(9, StopIteration))


def test_only_short_waits_are_slept(permits: PermitHouse) -> None:
    """A worker's slot waits with the call: who asks for more than a second has the error at once."""
    error = ConnectionError("later")
    error.retry_after = 5  # type: ignore[attr-defined]
    flaky = Flaky(1, error)
    bank = permits.downstream(retry=Retry(jitter="none", backoff="fixed", first_delay=0.001))
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="later"):
        bank.call(flaky)
    assert time.monotonic() - began < 1
    assert bank.stats().retry_exhausted_total == 1


def test_a_wait_that_the_budget_does_not_allow_is_not_begun(permits: PermitHouse) -> None:
    """The error is raised while there is time to do something about it."""
    bank = permits.downstream(retry=Retry(jitter="none", first_delay=0.9))
    with timeouts.budget(0.5):
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            bank.call(Flaky(1))
        assert time.monotonic() - began < 0.4


def test_a_further_try_takes_a_permit_too(permits: PermitHouse) -> None:
    """The downstream sees it as a call. Where there is none, the error is told and not the refusal."""
    bank = permits.downstream(rate=FixedWindow(2, per=60), retry=QUICK)
    flaky = Flaky(9)
    with pytest.raises(ConnectionError):
        bank.call(flaky)
    assert flaky.calls == 2
    with pytest.raises(RateLimitedError):
        bank.call(flaky)


def test_a_circuit_that_opens_ends_the_tries(permits: PermitHouse) -> None:
    """Nothing hammers what others have found to be down."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=1), retry=QUICK)
    bank.call(lambda: None)
    calls = []

    def fail() -> None:
        calls.append(1)
        permits.store.force("bank", "forced_open", until=None, who="ada", why="stop")
        assert bank.circuit is not None
        bank.circuit.apply(permits.store.circuit("bank"))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        bank.call(fail)
    assert calls == [1]


def test_what_ends_the_task_is_not_tried_again(permits: PermitHouse) -> None:
    """A soft time limit, a refusal of another downstream, a task's own retry."""
    always = Retry(max_retries=3, first_delay=0.001, retry_if=lambda exc: True)
    bank = permits.downstream(retry=always)
    soft_limit = type("SoftTimeLimitExceeded", (Exception,), {})
    for error in (soft_limit, RateLimitedError):
        flaky = Flaky(1, error)
        with pytest.raises(error):
            bank.call(flaky)
        assert flaky.calls == 1


def test_the_budget_of_retries_is_kept(permits: PermitHouse) -> None:
    """An outage is not answered with a multiple of the load."""
    budget = Budget(ratio=0.0001, min_per_second=0.2, window=10)
    bank = permits.downstream(retry=Retry(max_retries=3, first_delay=0.001, max_delay=0.001, budget=budget))
    made = 0
    for _ in range(10):
        flaky = Flaky(9)
        with pytest.raises(ConnectionError):
            bank.call(flaky)
        made += flaky.calls
    assert made == 12


def test_on_retry_is_told_and_cannot_fail_the_call(permits: PermitHouse, caplog: pytest.LogCaptureFixture) -> None:
    """Before each wait; what it raises is logged."""
    told: list[RetryEvent] = []

    def broken(event: RetryEvent) -> None:
        told.append(event)
        raise RuntimeError

    bank = permits.downstream(retry=Retry(max_retries=2, first_delay=0.001, on_retry=broken))
    assert bank.call(Flaky(1)) == 2
    assert [(event.task, event.attempt) for event in told] == [("bank", 1)]
    assert "on_retry of downstream bank failed" in caplog.text


def test_an_async_call_is_cancelled_when_its_time_is_over(permits: PermitHouse) -> None:
    """It is a DownstreamTimeout and a TimeoutError; the circuit counts it, and the figures."""
    bank = permits.downstream(timeout=Timeout(total=0.05), circuit=CircuitBreaker())
    cancelled = []

    async def hang() -> None:
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(DownstreamTimeout, match="it was cancelled") as caught:
        asyncio.run(bank.acall(hang))
    assert isinstance(caught.value, TimeoutError)
    assert cancelled == [True]
    stats = bank.stats()
    assert (stats.request_timeout_total, stats.circuit_breaker_failures_total) == (1, 1)


def test_a_timeout_of_the_functions_own_is_its_own(permits: PermitHouse) -> None:
    """It is not taken for the budget's, and it is counted."""

    async def late() -> None:
        raise TimeoutError("its own")

    def late_too() -> None:
        raise TimeoutError("its own")

    bank = permits.downstream(timeout=Timeout(total=PATIENCE, thread=True))
    with pytest.raises(TimeoutError, match="its own") as caught:
        asyncio.run(bank.acall(late))
    assert not isinstance(caught.value, DownstreamTimeout)
    with pytest.raises(TimeoutError, match="its own"):
        bank.call(late_too)
    assert bank.stats().request_timeout_total == 2


def test_a_timeout_is_tried_again_like_other_trouble(permits: PermitHouse) -> None:
    """Each try has its own time."""
    bank = permits.downstream(timeout=0.05, retry=QUICK)
    calls = []

    async def second_time() -> str:
        calls.append(1)
        if len(calls) == 1:
            await asyncio.sleep(PATIENCE)
        return "well"

    assert asyncio.run(bank.acall(second_time)) == "well"


def test_sync_code_in_a_thread_is_left_behind(permits: PermitHouse) -> None:
    """The caller goes on, and the thread does too, as its docstring says."""
    bank = permits.downstream(timeout=Timeout(total=0.05, thread=True))
    goes_on, ended = threading.Event(), threading.Event()

    def hang() -> None:
        goes_on.wait(PATIENCE)
        ended.set()

    with pytest.raises(DownstreamTimeout, match="goes on by itself"):
        bank.call(hang)
    assert not ended.is_set()
    goes_on.set()
    assert ended.wait(PATIENCE)
    assert bank.call(lambda: 5) == 5


def test_the_inner_call_never_has_more_time_than_the_outer_one(permits: PermitHouse) -> None:
    """A cascade shares one budget, across threads and tasks."""
    outer = permits.downstream("outer", timeout=Timeout(total=1, thread=True))
    inner = permits.downstream("inner", timeout=60)
    left = outer.call(lambda: inner.call(timeouts.remaining))
    assert left is not None
    assert 0 < left <= 1
    assert timeouts.remaining() is None

    async def within() -> float | None:
        return timeouts.remaining()

    async def cascade() -> float | None:
        return await inner.acall(within)

    with timeouts.budget(0.7):
        assert 0 < (asyncio.run(inner.acall(cascade)) or 0) <= 0.7


def test_a_timeout_that_cannot_work_is_a_mistake() -> None:
    """Told where it is declared."""
    for options, complaint in (
        ({}, "nothing ends"),
        ({"total": 0}, "0 lets no call through"),
        ({"connect": 5, "total": 3}, "longer than total"),
        ({"connect": 5, "thread": True}, "without total"),
    ):
        with pytest.raises(ConfigurationError, match=complaint):
            Timeout(**options)  # type: ignore[arg-type]


# -- late, and ended by itself ---------------------------------------------------------------------------------------


def test_sync_code_that_returns_late_has_failed_and_its_value_is_returned(permits: PermitHouse) -> None:
    """The work is done, so nothing is raised; the circuit, the figures and `explain` say what it took."""
    bank = permits.downstream(timeout=Timeout(total=0.01), circuit=CircuitBreaker(minimum_calls=2))

    def late() -> int:
        time.sleep(0.03)
        return 7

    assert bank.call(late) == 7
    stats = bank.stats()
    assert (stats.circuit_breaker_failures_total, stats.circuit_breaker_success_total) == (1, 0)
    assert stats.request_timeout_total == 1
    assert bank.explain()[-1].endswith("has failed when late); 1 were over")
    bank.call(time.sleep, 0.03)
    with pytest.raises(CircuitOpenError):
        bank.call(lambda: 1)


def test_only_the_try_that_answered_decides_whether_a_call_was_late(permits: PermitHouse) -> None:
    """Each try has its own time, and an error that came late is one outcome too."""
    bank = permits.downstream(timeout=Timeout(total=0.05), circuit=CircuitBreaker(), retry=QUICK)
    calls = []

    def late_once() -> str:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.08)
            raise TimeoutError
        return "well"

    assert bank.call(late_once) == "well"
    stats = bank.stats()
    assert (stats.circuit_breaker_failures_total, stats.circuit_breaker_success_total) == (0, 1)
    assert stats.request_timeout_total == 1


@pytest.mark.parametrize("mode", ["with", "async with"])
def test_a_block_is_the_budget_of_what_it_calls_and_has_failed_when_it_was_late(
    permits: PermitHouse, mode: str
) -> None:
    """What is called inside gets what is left; the block is not ended, and afterwards the budget is as it was."""
    bank = permits.downstream(timeout=Timeout(total=0.2), circuit=CircuitBreaker())
    inner = permits.downstream("inner", timeout=60)

    def inside(nap: float) -> float | None:
        left = inner.call(timeouts.remaining)
        time.sleep(nap)
        return left

    def run(nap: float) -> float | None:
        if mode == "with":
            with bank.permit():
                left = inside(nap)
            assert timeouts.remaining() is None
            return left

        async def block() -> float | None:
            async with bank.permit():
                left = inside(nap)
            assert timeouts.remaining() is None
            return left

        return asyncio.run(block())

    assert 0 < (run(0) or 0) <= 0.201  # of an epoch's instant, in doubles
    stats = bank.stats()
    assert (stats.circuit_breaker_success_total, stats.request_timeout_total) == (1, 0)
    run(0.25)
    stats = bank.stats()
    assert (stats.circuit_breaker_failures_total, stats.circuit_breaker_success_total) == (1, 1)
    assert stats.request_timeout_total == 1


def test_a_block_whose_calls_told_the_circuit_is_not_blamed_for_its_own_work(permits: PermitHouse) -> None:
    """The call was in time; what else the block did is not the downstream's fault. The figures have it."""
    bank = permits.downstream(timeout=Timeout(total=0.02), circuit=CircuitBreaker())
    with bank.permit():
        bank.call(lambda: None)
        time.sleep(0.04)
    stats = bank.stats()
    assert (stats.circuit_breaker_failures_total, stats.circuit_breaker_success_total) == (0, 1)
    assert stats.request_timeout_total == 1


def test_what_ends_the_caller_late_is_still_nothing(permits: PermitHouse) -> None:
    """A cancelled or refused block says nothing about the downstream, however long it took."""
    bank = permits.downstream(timeout=Timeout(total=0.01), circuit=CircuitBreaker())

    def refused() -> None:
        time.sleep(0.02)
        raise RateLimitedError("another's")

    with pytest.raises(RateLimitedError), bank.permit():
        refused()
    stats = bank.stats()
    assert (stats.circuit_breaker_failures_total, stats.circuit_breaker_success_total) == (0, 0)


def test_a_generator_has_no_budget_because_its_reader_has_the_time(permits: PermitHouse) -> None:
    """Between two items the reader works, and its own calls are not bounded by it."""
    bank = permits.downstream(timeout=Timeout(total=0.01), circuit=CircuitBreaker())

    @bank
    def items() -> Iterator[int]:
        yield 1
        yield 2

    for _ in items():
        assert timeouts.remaining() is None
        time.sleep(0.02)
    assert bank.stats().circuit_breaker_success_total == 1
