"""Answers kept in a process: keys that cannot collide, no stampede, bounded."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from taskguard.downstream import caching
from taskguard.downstream.caching import LastAnswers, cached, call_key
from taskguard.errors import ConfigurationError
from tests.clocks import ManualClock
from tests.unit.permithouse import PATIENCE, threads


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    manual = ManualClock()
    monkeypatch.setattr(caching, "LastAnswers", lambda most: LastAnswers(most=most, clock=manual))
    return manual


@pytest.fixture
def _hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_no_two_calls_share_a_key_by_accident() -> None:
    """Types, separators, positions, names and functions tell them apart."""

    def one(*args: Any, **kwargs: Any) -> None: ...

    def two(*args: Any, **kwargs: Any) -> None: ...

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (one, ("a", "b"), {}),
        (one, ("a,b",), {}),
        (one, ("a",), {"b": "b"}),
        (one, ("b", "a"), {}),
        (one, (1,), {}),
        (one, ("1",), {}),
        (one, (None,), {}),
        (one, ("None",), {}),
        (one, ((1, 2),), {}),
        (one, (1, 2), {}),
        (one, ([1, 2],), {}),
        (one, (1.0,), {}),
        (one, (True,), {}),
        (one, (b"1",), {}),
        (one, ({"1": 1},), {}),
        (one, ({1: 1},), {}),
        (one, ({1},), {}),
        (one, (), {}),
        (two, (), {}),
        (one, ({"a": 1},), {}),
        (one, (), {"a": 1}),
    ]
    keys = [call_key(fn, args, kwargs) for fn, args, kwargs in calls]
    assert len(set(keys)) == len(keys)


def test_an_argument_without_a_form_needs_a_key() -> None:
    """A lock's address is no key; the message says what to do."""
    with pytest.raises(ConfigurationError, match="give key="):
        cached(5)(lambda thing: thing)(threading.Lock())


def test_an_answer_is_kept_for_its_time(clock: ManualClock) -> None:
    """And for its arguments; `forget` drops all."""
    calls: list[int] = []

    @cached(60)
    def double(value: int) -> int:
        calls.append(value)
        return value * 2

    assert [double(2), double(2), double(3)] == [4, 4, 6]
    clock.advance(59.9)
    assert double(2) == 4
    clock.advance(0.2)
    assert double(2) == 4
    assert calls == [2, 3, 2]
    double.forget()  # type: ignore[attr-defined]
    double(2)
    assert calls == [2, 3, 2, 2]


@pytest.mark.usefixtures("_hasty")
def test_one_computes_and_the_others_wait_for_it() -> None:
    """No stampede: twelve threads, one computation, one answer."""
    calls: list[int] = []
    goes_on = threading.Event()

    @cached(60)
    def slow() -> object:
        calls.append(1)
        assert goes_on.wait(PATIENCE)
        return object()

    def work(index: int) -> object:
        if index == 0:
            threading.Timer(0.05, goes_on.set).start()
        return slow()

    found = threads(12, work)
    assert len(calls) == 1
    assert len({id(each) for each in found}) == 1


def test_the_old_answer_is_given_while_one_computes_the_next(clock: ManualClock) -> None:
    """Where stale allows it; past that they wait."""
    computing, goes_on = threading.Event(), threading.Event()
    goes_on.set()
    versions = iter(range(1, 9))

    @cached(60, stale=60)
    def version() -> int:
        computing.set()
        assert goes_on.wait(PATIENCE)
        return next(versions)

    assert version() == 1
    clock.advance(61)
    goes_on.clear()
    computing.clear()
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(version()), daemon=True)
    worker.start()
    assert computing.wait(PATIENCE)
    assert version() == 1
    goes_on.set()
    worker.join(PATIENCE)
    assert found == [2]
    assert version() == 2


def test_an_error_is_each_waiters_own_and_is_not_kept() -> None:
    """Trap 37: no instance is raised twice; the next caller tries again."""
    goes_on = threading.Event()
    calls: list[int] = []

    @cached(60)
    def fail() -> int:
        calls.append(1)
        if len(calls) == 1:
            assert goes_on.wait(PATIENCE)
            raise ConnectionError("down")
        return 5

    def work(index: int) -> int:
        if index == 0:
            threading.Timer(0.05, goes_on.set).start()
        return fail()

    found = threads(6, work)
    errors = [each for each in found if isinstance(each, ConnectionError)]
    assert len({id(each) for each in errors}) == len(errors)
    assert all(str(each) == "down" for each in errors)
    assert all(each == 5 or isinstance(each, ConnectionError) for each in found)
    assert fail() == 5


def test_async_answers_are_kept_alike_and_a_cancelled_computation_is_taken_over() -> None:
    """Who waits is not cancelled with who computed."""

    async def scene() -> tuple[list[int], int]:
        calls = []
        begun = asyncio.Event()

        @cached(60)
        async def slow() -> int:
            calls.append(1)
            begun.set()
            await asyncio.sleep(0.02)
            return len(calls)

        first = asyncio.create_task(slow())
        await begun.wait()
        others = [asyncio.create_task(slow()) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.gather(*others), len(calls)

    assert asyncio.run(scene()) == ([2] * 5, 2)


def test_only_so_many_answers_are_kept() -> None:
    """Trap 44: what was not asked for longest goes."""
    calls: list[int] = []

    @cached(60, most=3)
    def same(value: int) -> int:
        calls.append(value)
        return value

    for value in (1, 2, 3, 1, 4):
        same(value)
    same(1)
    same(2)
    assert calls == [1, 2, 3, 4, 2]


def test_a_cache_that_cannot_work_is_a_mistake() -> None:
    """Told where it is declared."""
    for options in ({"ttl": 0}, {"ttl": 5, "most": 0}, {"ttl": -1}):
        with pytest.raises(ConfigurationError):
            cached(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="generator"):

        @cached(5)
        def items() -> Iterator[int]:
            yield 1
