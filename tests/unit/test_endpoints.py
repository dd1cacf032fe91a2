"""Calls over several addresses: balanced, and around those that fail."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest

from taskguard.downstream.endpoints import Endpoints
from taskguard.errors import CircuitOpenError, ConfigurationError
from taskguard.policies import CircuitBreaker, Retry
from tests.unit.permithouse import PATIENCE, PermitHouse, threads

URLS = ["https://a", "https://b", "https://c"]


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


def test_they_take_turns(permits: PermitHouse) -> None:
    """Round robin, sync and async."""
    bank = Endpoints(URLS, name="bank", store=permits.desk)

    async def asked(url: str) -> str:
        return url

    async def scene() -> list[str]:
        return [await bank.acall(asked) for _ in range(3)]

    assert [bank.call(lambda url: url) for _ in range(4)] == [*URLS, URLS[0]]
    assert asyncio.run(scene()) == [URLS[1], URLS[2], URLS[0]]


def test_chance_reaches_all(permits: PermitHouse) -> None:
    """No endpoint is left without calls."""
    bank = Endpoints(URLS, balance="random", store=permits.desk)
    counts = Counter(bank.call(lambda url: url) for _ in range(600))
    assert set(counts) == set(URLS)
    assert min(counts.values()) > 120


def test_the_least_busy_is_taken(permits: PermitHouse) -> None:
    """Calls that last keep others away from their endpoint."""
    bank = Endpoints(URLS, balance="least_connections", store=permits.desk)
    together = threading.Barrier(6)

    def work(url: str) -> str:
        together.wait(PATIENCE)
        return url

    lock = threading.Lock()

    def one_by_one(_: int) -> str:
        with lock:
            block = bank.pick()
            url = block.__enter__()
        try:
            return work(url)
        finally:
            block.__exit__(None, None, None)

    assert sorted(Counter(threads(6, one_by_one)).values()) == [2, 2, 2]
    assert {each["active"] for each in bank.stats().values()} == {0}


def test_one_that_fails_is_left_out_until_it_recovers(permits: PermitHouse) -> None:
    """Only its circuit opens; after the wait one call probes it."""
    bank = Endpoints(URLS, name="bank", store=permits.desk, circuit=CircuitBreaker(minimum_calls=2, wait_in_open=30))
    ill = {"https://b"}

    def ask(url: str) -> str:
        if url in ill:
            raise ConnectionError(url)
        return url

    failures = 0
    for _ in range(12):
        try:
            bank.call(ask)
        except ConnectionError:
            failures += 1
    assert failures == 2
    assert bank.stats()["https://b"]["state"] == "open"
    assert {bank.call(ask) for _ in range(6)} == {"https://a", "https://c"}
    ill.clear()
    permits.clock.advance(30.001)
    assert {bank.call(ask) for _ in range(6)} == set(URLS)


def test_when_all_are_out_it_says_when_the_first_comes_back(permits: PermitHouse) -> None:
    """CircuitOpenError with the soonest retry_after, for sync and async."""
    bank = Endpoints(URLS[:2], store=permits.desk, circuit=CircuitBreaker(minimum_calls=1, wait_in_open=30))

    def fail(url: str) -> None:
        raise ConnectionError

    async def afail(url: str) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        bank.call(fail)
    permits.clock.advance(10)
    with pytest.raises(ConnectionError):
        bank.call(fail)
    with pytest.raises(CircuitOpenError, match="all 2 endpoints") as caught:
        bank.call(fail)
    assert caught.value.retry_after == pytest.approx(20, abs=0.1)
    with pytest.raises(CircuitOpenError):
        asyncio.run(bank.acall(afail))


def test_one_that_asked_to_be_left_alone_is_left_out(permits: PermitHouse) -> None:
    """Also by a process that learns of it from the store at its first call."""
    Endpoints(URLS, name="bank", store=permits.desk).endpoints[0].downstream.pause(30, why="it asked to")
    bank = Endpoints(URLS, name="bank", store=permits.another_desk())
    assert [bank.call(lambda url: url) for _ in range(3)] == [URLS[1], URLS[1], URLS[2]]
    another = Endpoints(URLS[:1], name="bank", store=permits.another_desk())

    async def scene() -> None:
        async with another.apick():
            raise AssertionError

    with pytest.raises(CircuitOpenError) as caught:
        asyncio.run(scene())
    assert caught.value.retry_after == pytest.approx(30, abs=0.1)


def test_a_retry_round_them_goes_to_the_next(permits: PermitHouse) -> None:
    """Each try picks anew."""
    bank = Endpoints(URLS, store=permits.desk)
    resilient = permits.downstream(retry=Retry(max_retries=2, first_delay=0.001, max_delay=0.001))

    def ask(url: str) -> str:
        if url != "https://c":
            raise ConnectionError
        return url

    assert resilient.call(bank.call, ask) == "https://c"


def test_addresses_that_cannot_be_balanced_are_a_mistake(permits: PermitHouse) -> None:
    """Told where it is declared."""
    for urls, options, complaint in (
        ([], {}, "no list of addresses"),
        ("https://a", {}, "no list of addresses"),
        (["https://a", "https://a"], {}, "given twice"),
        (URLS, {"balance": "best"}, "choose one of"),
    ):
        with pytest.raises(ConfigurationError, match=complaint):
            Endpoints(urls, **options)  # type: ignore[arg-type]
