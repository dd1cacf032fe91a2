"""Many calls from one task, so many at a time: by threads, or by tasks of the running event loop.

The calls are read one by one as places get free, so a million of them need no memory of a million. Results come in the
order of the calls. Budgets and other context variables go along.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, overload

from taskguard.errors import ConfigurationError
from taskguard.policies.checks import one_of

T = TypeVar("T")

Errors = Literal["raise", "return"]


@overload
def gather(calls: Iterable[Callable[[], T]], *, limit: int, errors: Literal["raise"] = ...) -> list[T]: ...
@overload
def gather(calls: Iterable[Callable[[], T]], *, limit: int, errors: Literal["return"]) -> list[T | BaseException]: ...
def gather(calls: Iterable[Callable[[], T]], *, limit: int, errors: Errors = "raise") -> Any:
    """What each of *calls* gives, at most *limit* of them at a time, each in a thread.

    errors: "raise": after the first error no further call is begun, those under way are waited for, and it is raised;
    "return": an error stands in its call's place. Each call is a function without arguments, such as
    ``functools.partial(bank.call, charge, order)``.
    """
    _check(limit, errors)
    source = _numbered(calls)
    results: dict[int, Any] = {}
    first: list[BaseException] = []
    lock = threading.Lock()

    def work() -> None:
        while not first:
            with lock:
                try:
                    index, call = next(source)
                except StopIteration:
                    return
                except BaseException as exc:  # noqa: BLE001 (the iterable's own error)
                    first.append(exc)
                    return
            try:
                results[index] = call()
            except Exception as exc:  # noqa: BLE001 (raised below, or returned)
                if errors == "raise":
                    first.append(exc)
                    return
                results[index] = exc
            except BaseException as exc:  # noqa: BLE001 (the end of a thread must not be the end of its news)
                first.append(exc)
                return

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(work,), name=f"taskguard-gather-{n}", daemon=True)
        for n in range(limit - 1)
    ]
    for thread in threads:
        if first:
            break
        thread.start()
    try:
        contextvars.copy_context().run(work)
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if first:
        raise first[0]
    return [results[index] for index in sorted(results)]


@overload
async def agather(
    calls: Iterable[Callable[[], Awaitable[T]]], *, limit: int, errors: Literal["raise"] = ...
) -> list[T]: ...
@overload
async def agather(
    calls: Iterable[Callable[[], Awaitable[T]]], *, limit: int, errors: Literal["return"]
) -> list[T | BaseException]: ...
async def agather(calls: Iterable[Callable[[], Awaitable[T]]], *, limit: int, errors: Errors = "raise") -> Any:
    """The same for async functions: "raise" cancels those under way. A cancelled gathering cancels them too."""
    _check(limit, errors)
    source = _numbered(calls)
    results: dict[int, Any] = {}

    async def work() -> None:
        for index, call in source:
            try:
                results[index] = await call()
            except Exception as exc:
                if errors == "raise":
                    raise
                results[index] = exc

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(limit):
                group.create_task(work())
    except BaseExceptionGroup as trouble:
        raise trouble.exceptions[0] from None
    return [results[index] for index in sorted(results)]


def _numbered(calls: Iterable[Callable[[], T]]) -> Iterator[tuple[int, Callable[[], T]]]:
    for index, call in enumerate(calls):
        if not callable(call):
            raise ConfigurationError(f"gather: {call!r} cannot be called; give functions, such as partial(fetch, url)")
        yield index, call


def _check(limit: object, errors: str) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"gather: limit {limit!r} must be a whole number, 1 or more")
    one_of("gather: errors", errors, ("raise", "return"))
