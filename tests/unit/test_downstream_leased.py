"""``leased=True``: a downstream whose permits are taken in batches and spent in the process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from celery import Celery

from taskguard import ConfigurationError, Downstream
from taskguard.errors import CircuitOpenError, RateLimitedError
from taskguard.policies import CircuitBreaker, Concurrency, LeakyBucket, Limit, Retry, TokenBucket
from taskguard.record import State
from taskguard.testing import Reliable
from tests.unit.downstreamhouse import ran, taskguard_app  # noqa: F401
from tests.unit.permithouse import PermitHouse
from tests.unit.rehearsal import declare, noting

FAST = TokenBucket(10_000, per=1, burst=1_000)


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rate": FAST, "leased": "yes"}, "leased='yes' is neither True nor False"),
        ({}, "leased=True has no rate whose permits it could lease"),
        ({"rate": LeakyBucket(10)}, "limit 'bank' cannot be leased; leased=True takes TokenBucket"),
        ({"rate": Limit(FAST, key="{n}")}, "cannot be leased"),
        (
            {"rate": TokenBucket(100, burst=10), "cost": 8},
            "cost 8 is over the 5 permits that limit 'bank'",
        ),
        ({"rate": TokenBucket(10_000, burst=10)}, "leased=True needs a burst of 501 or more"),
    ],
)
def test_what_cannot_be_leased_fails_where_it_is_declared(options: dict[str, Any], complaint: str) -> None:
    """With the way out."""
    with pytest.raises(ConfigurationError, match=complaint):
        Downstream("bank", **{"leased": True, **options})


def test_a_thousand_calls_cost_a_few_questions(permits: PermitHouse) -> None:
    """Each batch is twice the one before while it is spent in time."""
    bank = permits.downstream(rate=FAST, leased=True)
    for _ in range(400):
        bank.call(int)
        permits.clock.advance(0.0001)
    assert permits.store.asked["admit"] < 20


def test_it_admits_no_more_than_the_rate_and_says_when_to_come_back(permits: PermitHouse) -> None:
    """Two processes at once spend one bucket."""
    both = [permits.downstream(rate=FAST, leased=True, desk=permits.another_desk()) for _ in range(2)]
    refusals: list[RateLimitedError] = []
    for number in range(5_000):
        try:
            both[number % 2].call(int)
        except RateLimitedError as refused:
            refusals.append(refused)
    assert 400 <= 5_000 - len(refusals) <= 1_000
    assert all(0 < (each.retry_after or 0) <= 0.05 and each.slot_at is None for each in refusals)


def test_it_waits_as_long_as_it_may(permits: PermitHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the next batch; no slot is booked."""
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        permits.clock.advance(seconds)

    monkeypatch.setattr("taskguard.downstream.admittance.time.sleep", nap)
    bank = permits.downstream(rate=TokenBucket(100, per=1, burst=6), leased=True, max_wait=1)
    for _ in range(12):
        bank.call(int)
    assert 0.0 < sum(naps) <= 0.2
    assert permits.store.asked["unbook"] == 0


def test_retries_pay_too(permits: PermitHouse) -> None:
    """Each try spends a permit, and the last one that there is not ends it."""
    tried: list[int] = []

    def fails() -> None:
        tried.append(1)
        raise ConnectionError

    bank = permits.downstream(
        rate=TokenBucket(1, per=100, burst=2), leased=True, retry=Retry(max_retries=9, first_delay=0, jitter="none")
    )
    with pytest.raises(ConnectionError):
        bank.call(fails)
    assert len(tried) == 1  # a burst of two leaves one while permits are leased, and the retry has none


def test_circuit_and_places_are_asked_beside_it(permits: PermitHouse) -> None:
    """They are the fleet's, and never lent."""
    bank = permits.downstream(rate=FAST, leased=True, concurrency=Concurrency(1), circuit=CircuitBreaker())
    with bank.permit(covers=False), pytest.raises(Exception, match="all 1 places of the fleet are taken"):
        bank.call(int)
    permits.store.force("bank", "forced_open", until=None, who="ann", why="test")
    elsewhere = permits.downstream(rate=FAST, leased=True, circuit=CircuitBreaker(), desk=permits.another_desk())
    with pytest.raises(CircuitOpenError):
        elsewhere.call(int)


def test_async_calls_wait_for_no_store_while_there_are_permits(permits: PermitHouse) -> None:
    """The event loop spends what the process holds."""
    bank = permits.downstream(rate=FAST, leased=True)

    async def one() -> int:
        return 7

    async def many() -> list[int]:
        return [await bank.acall(one) for _ in range(300)]

    assert asyncio.run(many()) == [7] * 300
    assert permits.store.asked["admit"] < 20


@pytest.mark.parametrize(("declared", "goes"), [("allow", True), ("refuse", False)])
def test_while_the_store_is_away_what_is_declared_holds(permits: PermitHouse, declared: Any, goes: bool) -> None:
    """As for every other limit."""
    bank = permits.downstream(rate=FAST, leased=True, on_store_down=declared)
    permits.store.down = True
    if goes:
        assert bank.call(int) == 0
        return
    with pytest.raises(Exception, match="the permit store does not answer"):
        bank.call(int)


def test_a_computed_cost_that_no_lease_admits_says_so(permits: PermitHouse) -> None:
    """Leased permits have a smaller bucket than the policy says."""
    bank = permits.downstream(rate=TokenBucket(100, burst=10), cost=lambda n: n, leased=True)
    bank.call(abs, 4)
    with pytest.raises(RateLimitedError, match="a call of cost 8 is over the 5 that limit 'bank' ever admits"):
        bank.call(abs, 8)


def test_refused_tasks_come_back_one_by_one(reliable: Reliable, taskguard_app: Celery, ran: list[int]) -> None:  # noqa: F811
    """Each at a turn of its own: they came back together for every permit, a thousand deliveries for sixty tasks."""
    bank = Downstream("bank", rate=TokenBucket(20, per=1, burst=2.2), leased=True)
    sent = declare(taskguard_app, noting(ran), name="call", downstream=bank, retry=Retry(max_retries=0))
    for number in range(60):
        sent.delay(number)
    reliable.drain(until="idle")
    assert sorted(ran) == list(range(60))
    deferrals = [event for event in reliable.events if event.name == "deferred"]
    assert len(deferrals) < 180


def test_a_refused_task_comes_back(reliable: Reliable, taskguard_app: Celery, ran: list[int]) -> None:  # noqa: F811
    """After the wait that it is told, with no attempt spent."""
    bank = Downstream("bank", rate=TokenBucket(1, per=1, burst=2), leased=True)
    sent = declare(taskguard_app, noting(ran), name="call", downstream=bank, retry=Retry(max_retries=0))
    for number in range(4):
        sent.delay(number)
    reliable.drain()
    assert len(ran) < 4
    assert not list(reliable.store.scan(State.DEAD))
    reliable.drain(until="idle")
    assert sorted(ran) == [0, 1, 2, 3]
