"""The downstream as users meet it: one object, called, awaited, as a decorator and as a block."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from taskguard.downstream.service import booked_for, booking
from taskguard.errors import ConfigurationError, RateLimitedError, Refused
from taskguard.permits import RateAsk
from taskguard.policies import (
    CircuitBreaker,
    Concurrency,
    FixedWindow,
    Limit,
    SlidingLog,
    TokenBucket,
)
from tests.unit.permithouse import PermitHouse


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


@pytest.fixture
def _hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_every_way_to_call_is_guarded_alike(permits: PermitHouse) -> None:
    """call, acall, both decorators, a generator, an async one, and both blocks take one permit each."""
    bank = permits.downstream(rate=FixedWindow(8, per=60))

    async def answer(value: int) -> int:
        return value

    @bank
    def plain(value: int) -> int:
        return value

    @bank
    async def awaited(value: int) -> int:
        return value

    @bank
    def items() -> Iterator[int]:
        yield 5

    @bank
    async def aitems() -> AsyncIterator[int]:
        yield 6

    async def asynchronously() -> list[int]:
        async with bank.permit():
            pass
        return [await bank.acall(answer, 3), await awaited(4), *[item async for item in aitems()]]

    with bank.permit():
        pass
    found = [bank.call(lambda value: value, 1), plain(2), *items(), *asyncio.run(asynchronously())]
    assert found == [1, 2, 5, 3, 4, 6]
    with pytest.raises(RateLimitedError):
        plain(9)
    assert permits.store.asked["admit"] == 9


def test_a_refusal_says_what_refused_and_when_to_come_back(permits: PermitHouse) -> None:
    """Waiting exactly retry_after admits; the message names the limit."""
    bank = permits.downstream(rate=TokenBucket(2, per=1))
    bank.call(lambda: None)
    bank.call(lambda: None)
    with pytest.raises(
        RateLimitedError, match=r"bank: limit 'bank' \(2 per 1 s\) is used up; try again in 0.5 s"
    ) as caught:
        bank.call(lambda: None)
    refused = caught.value
    assert (refused.downstream, refused.limit, refused.slot_at) == ("bank", "bank", None)
    permits.clock.advance(refused.retry_after or 0)
    assert bank.call(lambda: 5) == 5


def test_a_refusal_survives_a_result_backend() -> None:
    """It is rebuilt from a pickle with all it says."""
    refused = pickle.loads(pickle.dumps(RateLimitedError("no", retry_after=3.0, slot_at=7.0, downstream="bank")))
    assert (str(refused), refused.retry_after, refused.slot_at, refused.downstream) == ("no", 3.0, 7.0, "bank")
    assert isinstance(refused, Refused)


def test_each_refusal_is_an_exception_of_its_own(permits: PermitHouse) -> None:
    """Trap 37: none is raised twice, so no traceback grows."""
    bank = permits.downstream(rate=TokenBucket(1, per=60))
    bank.call(lambda: None)
    caught = []
    for _ in range(5):
        with pytest.raises(RateLimitedError) as refused:
            bank.call(lambda: None)
        caught.append(refused.value)
    depths = []
    for each in caught:
        trace, depth = each.__traceback__, 0
        while trace is not None:
            trace, depth = trace.tb_next, depth + 1
        depths.append(depth)
    assert len({id(each) for each in caught}) == 5
    assert depths[1] == depths[-1]


def test_a_refusal_that_still_holds_is_not_asked_for_again(permits: PermitHouse) -> None:
    """The store is asked once while retry_after runs; then again."""
    bank = permits.downstream(rate=TokenBucket(1, per=60))
    bank.call(lambda: None)
    for _ in range(10):
        with pytest.raises(RateLimitedError):
            bank.call(lambda: None)
    assert permits.store.asked["admit"] == 2
    permits.clock.advance(60)
    bank.call(lambda: None)


def test_stacked_limits_are_all_or_nothing(permits: PermitHouse) -> None:
    """Trap 9: a call that the second limit refuses takes nothing of the first."""
    bank = permits.downstream(rate={"wide": FixedWindow(2, per=3600), "narrow": SlidingLog(1, per=10)})
    bank.call(lambda: None)
    for _ in range(5):
        permits.desk.denials.forget()
        with pytest.raises(RateLimitedError, match="bank/narrow"):
            bank.call(lambda: None)
    permits.clock.advance(10.001)
    bank.call(lambda: None)
    permits.clock.advance(10.001)
    with pytest.raises(RateLimitedError, match="bank/wide"):
        bank.call(lambda: None)


def test_each_tenant_has_a_limit_of_its_own(permits: PermitHouse) -> None:
    """By template, by function, and by an explicit key; beside a limit for all."""
    bank = permits.downstream(
        rate={"tenant": Limit(FixedWindow(1, per=60), key="{tenant}"), "all": FixedWindow(3, per=60)}
    )

    @bank
    def charge(tenant: str, amount: int = 1) -> str:
        return tenant

    assert charge("acme") == "acme"
    with pytest.raises(RateLimitedError, match="bank/tenant=acme"):
        charge(tenant="acme", amount=2)
    assert charge("globex") == "globex"
    with bank.permit(key="initech"):
        pass
    with pytest.raises(RateLimitedError, match="bank/all"):
        bank.using(key="umbrella").call(lambda: None)


def test_no_key_can_be_another_limits(permits: PermitHouse) -> None:
    """Separators in keys are quoted; long keys are told apart by a digest; empty ones are refused."""
    bank = permits.downstream(rate=Limit(FixedWindow(1, per=60), key="{a}/{b}"))
    names = set()
    for key in ("a/b", "a", "a%2Fb", "=", "x" * 500, "x" * 501):
        with bank.permit(key=key):
            pass
        names.add(key)
    assert len(names) == 6
    with pytest.raises(ConfigurationError, match="finds no"):
        bank.call(lambda a: a, 1)


def test_the_cost_of_a_call_is_taken(permits: PermitHouse) -> None:
    """A number, a function of the arguments, or what the block says; over the burst is refused for good."""
    bank = permits.downstream(rate=TokenBucket(10, per=60), cost=lambda items: len(items))
    bank.call(lambda items: None, [1, 2, 3])
    with bank.permit(cost=7):
        pass
    with pytest.raises(RateLimitedError) as caught:
        bank.using(cost=1).call(lambda: None)
    assert caught.value.retry_after == pytest.approx(6)
    with pytest.raises(RateLimitedError, match="over the 10 that limit 'bank' ever admits") as caught:
        bank.using(cost=11).call(lambda: None)
    assert caught.value.retry_after is None


def test_further_rates_are_decided_together(permits: PermitHouse) -> None:
    """A rule's limit rides along, all or nothing."""
    bank = permits.downstream(rate=FixedWindow(2, per=60))
    rule = RateAsk("rule:7", FixedWindow(1, per=60))
    with bank.permit(also=(rule,)):
        pass
    with pytest.raises(RateLimitedError) as caught, bank.permit(also=(rule,)):
        pass
    assert caught.value.limit == "rule:7"
    bank.call(lambda: None)


def test_a_refusal_books_where_the_caller_will_come_back(permits: PermitHouse) -> None:
    """slot_at is told; who comes back for it is let in, before one who has no booking."""
    bank = permits.downstream(rate=TokenBucket(1, per=10))
    bank.call(lambda: None)
    token = booking.set(True)
    try:
        slots = []
        for _ in range(3):
            with pytest.raises(RateLimitedError) as caught:
                bank.call(lambda: None)
            slots.append(caught.value.slot_at)
    finally:
        booking.reset(token)
    first, second, third = (slot or 0 for slot in slots)
    assert second - first == pytest.approx(10, abs=0.01)
    assert third - second == pytest.approx(10, abs=0.01)
    permits.clock.advance(10)
    permits.desk.denials.forget()
    with pytest.raises(RateLimitedError):
        bank.call(lambda: None)
    came_back = booked_for.set(frozenset({"bank"}))
    try:
        assert bank.call(lambda: 5) == 5
        assert booked_for.get() == frozenset()
    finally:
        booked_for.reset(came_back)


def test_a_shadow_decides_and_tells_and_refuses_nothing(permits: PermitHouse) -> None:
    """What it would have refused is counted and told, for rates, places and circuits."""
    bank = permits.downstream(rate=FixedWindow(1, per=60), concurrency=1, shadow=True)
    for _ in range(3):
        assert bank.call(lambda: 5) == 5
    assert bank.stats().shadow_refused_total == 2
    assert len(permits.told("would_refuse")) == 2
    full = permits.downstream("full", concurrency=Concurrency(1, local=True), shadow=True)
    with full.permit(covers=False):
        assert full.call(lambda: 5) == 5
    assert full.stats().bulkhead_active == 0
    shaky = permits.downstream("shaky", circuit=CircuitBreaker(minimum_calls=1), shadow=True)
    with pytest.raises(ZeroDivisionError):
        shaky.call(lambda: 1 / 0)
    assert shaky.call(lambda: 5) == 5


def test_a_pause_holds_the_whole_fleet_and_ends_by_itself(permits: PermitHouse) -> None:
    """A downstream that asked to be left alone is; also by processes that never heard it say so."""
    bank = permits.downstream(rate=TokenBucket(100))
    other = permits.downstream(desk=permits.another_desk(), rate=TokenBucket(100))
    bank.call(lambda: None)
    bank.pause(30, why="429")
    for each in (bank, other):
        with pytest.raises(RateLimitedError, match="asked to be left alone") as caught:
            each.call(lambda: None)
        assert caught.value.retry_after == pytest.approx(30, abs=0.1)
    permits.clock.advance(30.001)
    assert bank.call(lambda: 5) == 5
    assert other.call(lambda: 5) == 5


def test_a_429_with_retry_after_pauses_the_fleet(permits: PermitHouse) -> None:
    """Read from the exception's response, whatever library it is of."""
    bank = permits.downstream(rate=TokenBucket(100), circuit=CircuitBreaker())
    response = type("Response", (), {"status_code": 429, "headers": {"Retry-After": "12"}})()

    def throttled() -> None:
        error = RuntimeError("429")
        error.response = response  # type: ignore[attr-defined]
        raise error

    with pytest.raises(RuntimeError):
        bank.call(throttled)
    with pytest.raises(RateLimitedError) as caught:
        permits.downstream(desk=permits.another_desk(), rate=TokenBucket(100), circuit=CircuitBreaker()).call(len, "")
    assert caught.value.retry_after == pytest.approx(12, abs=0.1)
