"""Bulkheads that stand alone: a pool of threads with a bounded queue, and its counterpart for tasks of an event loop.

What is slow gets a pool of its own, so that it can use up that and nothing else. When all are busy and the queue is
full, a call is refused at once, with the figures; the queue is short because what waits in it is late already.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from taskguard.clock import Duration, seconds
from taskguard.downstream import timeouts
from taskguard.downstream.slots import LocalSlots
from taskguard.downstream.tallies import Tally
from taskguard.downstream.tending import begins_anew
from taskguard.errors import BulkheadFullError, ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BulkheadStats:
    """How a bulkhead stands. *available*: calls it would start at once."""

    name: str
    size: int
    active: int
    waiting: int
    available: int
    completed: int
    rejected: int


class _Bulkhead:
    def __init__(self, name: str, size: int, queue: int) -> None:
        kind = type(self).__name__
        for what, value, least in (("size", size, 1), ("queue", queue, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{kind}.{what}: {value!r} must be a whole number, {least} or more")
        self.name, self.size, self.queue = name, size, queue
        self._rejected, self._completed = Tally(), Tally()

    def _full(self, active: int, waiting: int) -> BulkheadFullError:
        self._rejected.add()
        return BulkheadFullError(
            f"{self.name}: {active} of {self.size} are busy, {waiting} of {self.queue} wait; call later, or enlarge it",
            retry_after=0.05,
            downstream=self.name,
            limit=self.name,
        )

    def _stats(self, active: int, waiting: int) -> BulkheadStats:
        available = max(0, self.size - active)
        return BulkheadStats(
            self.name, self.size, active, waiting, available, self._completed.total(), self._rejected.total()
        )


class ThreadPoolBulkhead(_Bulkhead):
    """*size* threads of its own, and at most *queue* calls that wait for one. Forked children make their own threads.

    Context variables (the budget among them) go along with a call.
    """

    def __init__(self, name: str, size: int, queue: int = 0) -> None:
        super().__init__(name, size, queue)
        self._slots = LocalSlots(size + queue)
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """Threads are not inherited."""
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix=f"taskguard-{self.name}")

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start *fn*, now or when a thread is free. Raises BulkheadFullError where the queue is full."""
        if not self._slots.take():
            taken = self._slots.active
            raise self._full(min(self.size, taken), max(0, taken - self.size))
        context = contextvars.copy_context()
        try:
            future = self._threads.submit(lambda: context.run(fn, *args, **kwargs))
        except BaseException:
            self._slots.release()
            raise
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: Future[T]) -> None:
        self._slots.release()
        if not future.cancelled():
            self._completed.add()

    def call(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run *fn* in the pool and wait for it, as long as the budget lasts; then DownstreamTimeout.

        What has not begun by then never does; what has begun goes on, as `timeouts.in_thread` says.
        """
        timeouts.check(self.name)
        future = self.submit(fn, *args, **kwargs)
        left = timeouts.remaining()
        try:
            return future.result(left)
        except TimeoutError:
            if future.done() and not future.cancelled():
                raise
            began = not future.cancel()
            what = "its thread goes on by itself" if began else "it was not begun"
            raise timeouts.timed_out(self.name, left or 0.0, what) from None

    async def acall(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same from an event loop."""
        timeouts.check(self.name)
        future = self.submit(fn, *args, **kwargs)
        left = timeouts.remaining()
        waiting = asyncio.wrap_future(future)
        if left is None:
            return await waiting
        return await timeouts.in_loop(lambda: waiting, allowed=left, downstream=self.name)

    def stats(self) -> BulkheadStats:
        """How it stands."""
        taken = self._slots.active
        return self._stats(min(self.size, taken), max(0, taken - self.size))

    def close(self) -> None:
        """End the threads when their calls are done; what waits is not begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncBulkhead(_Bulkhead):
    """*size* tasks at once, and at most *queue* that wait, each at most *max_wait* seconds and within its budget."""

    def __init__(self, name: str, size: int, queue: int = 0, *, max_wait: Duration | None = None) -> None:
        super().__init__(name, size, queue)
        self._max_wait = None if max_wait is None else seconds(max_wait, what="AsyncBulkhead.max_wait")
        self._slots = LocalSlots(size)

    async def __aenter__(self) -> Self:
        timeouts.check(self.name)
        if self._slots.take():
            return self
        if self._slots.waiting >= self.queue:
            raise self._full(self._slots.active, self._slots.waiting)
        place = self._slots.ask()
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(place)), timeouts.within(self._max_wait))
        except TimeoutError:
            if self._slots.withdraw(place):
                raise self._full(self._slots.active, self._slots.waiting) from None
        except BaseException:
            if not self._slots.withdraw(place):
                self._slots.release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._slots.release()
        self._completed.add()

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await *fn* inside. Raises BulkheadFullError where there is no room."""
        async with self:
            return await fn(*args, **kwargs)

    def stats(self) -> BulkheadStats:
        """How it stands."""
        return self._stats(self._slots.active, self._slots.waiting)
