"""Many calls from one task, bounded; and the bulkheads that stand alone."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest

from taskguard.downstream import timeouts
from taskguard.downstream.gathering import agather, gather
from taskguard.downstream.pools import AsyncBulkhead, ThreadPoolBulkhead
from taskguard.errors import BulkheadFullError, ConfigurationError, DownstreamTimeout
from tests.unit.permithouse import PATIENCE


class Inside:
    """How many are inside at once."""

    def __init__(self, expected: int) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0
        self._expected = expected
        self.full = threading.Event()

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now >= self._expected:
                self.full.set()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1


def test_results_come_in_order_and_no_more_than_the_limit_at_once() -> None:
    """By threads: exactly four of twenty are under way together."""
    inside = Inside(4)

    def work(index: int) -> int:
        with inside:
            assert inside.full.wait(PATIENCE)
            return index

    assert gather((partial(work, index) for index in range(20)), limit=4) == list(range(20))
    assert inside.most == 4


def test_async_results_alike() -> None:
    """By tasks of the running loop."""
    inside = Inside(4)

    async def work(index: int) -> int:
        with inside:
            await asyncio.sleep(0.001 * (index % 3))
            return index

    async def scene() -> list[int]:
        return await agather((partial(work, index) for index in range(20)), limit=4)

    assert asyncio.run(scene()) == list(range(20))
    assert inside.most == 4


def test_the_first_error_is_raised_and_nothing_more_begun() -> None:
    """Those under way are waited for."""
    begun: list[int] = []

    def work(index: int) -> int:
        begun.append(index)
        if index == 1:
            raise ConnectionError("one")
        return index

    with pytest.raises(ConnectionError, match="one"):
        gather((partial(work, index) for index in range(1000)), limit=1)
    assert begun == [0, 1]


def test_errors_may_stand_in_their_places() -> None:
    """Declared with errors="return"."""

    def work(index: int) -> int:
        if index % 2:
            raise ValueError(index)
        return index

    async def awork(index: int) -> int:
        return work(index)

    found = gather([partial(work, index) for index in range(4)], limit=2, errors="return")
    assert [each if isinstance(each, int) else repr(each) for each in found] == [0, "ValueError(1)", 2, "ValueError(3)"]

    async def scene() -> list[Any]:
        return await agather([partial(awork, index) for index in range(4)], limit=2, errors="return")

    assert [type(each) for each in asyncio.run(scene())] == [int, ValueError, int, ValueError]


def test_an_async_error_cancels_those_under_way() -> None:
    """And is raised as itself, not as a group."""
    cancelled: list[int] = []

    async def work(index: int) -> None:
        if index == 1:
            raise ConnectionError
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    async def scene() -> None:
        await agather([partial(work, index) for index in range(5)], limit=2)

    with pytest.raises(ConnectionError):
        asyncio.run(scene())
    assert cancelled == [0]


def test_an_endless_iterable_is_read_as_places_get_free() -> None:
    """Its own error is raised too."""

    def calls() -> Any:
        yield lambda: 1
        raise LookupError("no more")

    with pytest.raises(LookupError):
        gather(calls(), limit=3)


def test_the_budget_goes_along() -> None:
    """Into threads as into tasks."""
    with timeouts.budget(5):
        assert all(0 < (left or 0) <= 5 for left in gather([timeouts.remaining] * 3, limit=3))


def test_a_gathering_that_cannot_work_is_a_mistake() -> None:
    """Told with the value."""
    for limit, errors in ((0, "raise"), (True, "raise"), (2, "ignore")):
        with pytest.raises(ConfigurationError):
            gather([], limit=limit, errors=errors)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="cannot be called"):
        gather([5], limit=1)  # type: ignore[list-item]


def test_a_pool_refuses_what_neither_fits_nor_may_wait() -> None:
    """D4: a named pool, its figures, a clear refusal, and room again afterwards."""
    goes_on = threading.Event()
    begun = threading.Semaphore(0)

    def hold() -> int:
        begun.release()
        goes_on.wait(PATIENCE)
        return 5

    with ThreadPoolBulkhead("mail", size=2, queue=1) as pool:
        held = [pool.submit(hold) for _ in range(3)]
        for _ in range(2):
            assert begun.acquire(timeout=PATIENCE)
        with pytest.raises(BulkheadFullError, match="mail: 2 of 2 are busy, 1 of 1 wait"):
            pool.submit(hold)
        stats = pool.stats()
        assert (stats.active, stats.waiting, stats.available, stats.rejected) == (2, 1, 0, 1)
        goes_on.set()
        assert [each.result(PATIENCE) for each in held] == [5, 5, 5]
        assert pool.call(lambda: 7) == 7
        assert asyncio.run(pool.acall(lambda: 8)) == 8
        assert pool.stats().completed >= 4


def test_a_pool_leaves_a_late_call_behind() -> None:
    """What has not begun never does."""
    goes_on = threading.Event()
    ran: list[int] = []
    with ThreadPoolBulkhead("mail", size=1, queue=1) as pool:
        pool.submit(goes_on.wait, PATIENCE)
        with timeouts.budget(0.05), pytest.raises(DownstreamTimeout, match="was not begun"):
            pool.call(ran.append, 1)
        goes_on.set()
    assert ran == []


def test_an_async_bulkhead_holds_a_bounded_queue() -> None:
    """Two inside, one waits, the fourth is refused; a cancelled waiter leaves its place."""

    async def scene() -> None:
        bulkhead = AsyncBulkhead("mail", size=2, queue=1)
        goes_on = asyncio.Event()
        inside = [asyncio.create_task(bulkhead.call(goes_on.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        stats = bulkhead.stats()
        assert (stats.active, stats.waiting, stats.available) == (2, 1, 0)
        with pytest.raises(BulkheadFullError, match="2 of 2 are busy, 1 of 1 wait"):
            await bulkhead.call(goes_on.wait)
        inside[2].cancel()
        await asyncio.sleep(0)
        assert bulkhead.stats().waiting == 0
        goes_on.set()
        assert await asyncio.gather(*inside[:2]) == [True, True]
        stats = bulkhead.stats()
        assert (stats.active, stats.completed, stats.rejected) == (0, 2, 1)

    asyncio.run(scene())


def test_a_waiter_of_an_async_bulkhead_gives_up_in_time() -> None:
    """Its max_wait, or its budget."""

    async def scene() -> None:
        bulkhead = AsyncBulkhead("mail", size=1, queue=5, max_wait=0.02)
        async with bulkhead:
            with pytest.raises(BulkheadFullError):
                await bulkhead.call(asyncio.sleep, 0)
        await bulkhead.call(asyncio.sleep, 0)

    asyncio.run(scene())


@pytest.mark.parametrize(("size", "queue"), [(0, 0), (True, 0), (1, -1), (1.5, 0)])
def test_a_bulkhead_without_room_is_a_mistake(size: Any, queue: Any) -> None:
    """Told where it is declared."""
    for kind in (ThreadPoolBulkhead, AsyncBulkhead):
        with pytest.raises(ConfigurationError):
            kind("mail", size=size, queue=queue)
