"""Time budgets: how long a call may take, shared by all that it calls in turn.

A budget is an instant in a context variable. Whoever calls further takes what is left of it, so the inner call never
outlasts the outer one, and what is sent on to the next service is the remainder. A budget that is over ends a call
before it begins. What ends a call that is under way is another question: async code is cancelled, transports have
timeouts of their own (`taskguard.clients`), and other sync code can only be left behind (`in_thread`), or be counted
as late when it has ended.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from taskguard.clock import Duration, seconds, wall_clock
from taskguard.errors import DownstreamTimeout

T = TypeVar("T")

deadline_at: ContextVar[float | None] = ContextVar("taskguard_deadline_at", default=None)
"""The instant (epoch seconds) at which the budget of this context is over; None: there is none."""


def remaining() -> float | None:
    """Seconds left of the budget, 0.0 when it is over; None where there is none."""
    at = deadline_at.get()
    return None if at is None else max(0.0, at - wall_clock())


def within(total: float | None) -> float | None:
    """The lesser of *total* seconds and what is left; None where nothing bounds."""
    left = remaining()
    if left is None:
        return total
    return left if total is None else min(total, left)


@contextmanager
def budget(total: Duration | None) -> Iterator[float | None]:
    """Run the block under a budget of *total* seconds, never more than what is left. Gives the seconds there are."""
    allowed = within(None if total is None else seconds(total, what="budget"))
    if allowed is None:
        yield None
        return
    token = deadline_at.set(wall_clock() + allowed)
    try:
        yield allowed
    finally:
        deadline_at.reset(token)


def check(downstream: str) -> None:
    """Raise DownstreamTimeout where the budget is over: the call is not begun."""
    if remaining() == 0.0:
        raise DownstreamTimeout(
            f"{downstream}: no time is left for this call; it was not made. Give a later deadline, or call sooner",
            downstream=downstream,
        )


def in_thread(
    fn: Callable[..., T],
    args: Any,
    kwargs: Any,
    *,
    allowed: float,
    downstream: str,
    left_behind: Callable[[Future[Any]], None] | None = None,
) -> T:
    """``fn(*args, **kwargs)`` in a thread of its own; DownstreamTimeout after *allowed* seconds.

    The caller goes on then, **the thread does too**: Python cannot end it. Until *fn* returns by itself it keeps its
    connection, its locks, its memory and whatever it changes, and its result is thrown away. So the work may still be
    done after the timeout: only for what is idempotent, and only as the last resort where the library has no timeout
    of its own. Each call costs a thread (some 50 us); thread-locals (a session, a transaction) are not the caller's;
    context variables are copied. The process does not wait for such threads when it exits. C code that holds the
    interpreter lock is not interrupted: then the timeout comes when it lets go. *left_behind* is given the thread's
    end: until then a bulkhead's place is taken, by one call and the threads that its tries left behind.
    """
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            outcome.set_result(context.run(fn, *args, **kwargs))
        except BaseException as exc:  # noqa: BLE001 (it belongs to the caller)
            outcome.set_exception(exc)

    threading.Thread(target=work, name=f"taskguard-call-{downstream}", daemon=True).start()
    try:
        return outcome.result(allowed)
    except WaitedTooLong:
        if outcome.done():  # the function's own TimeoutError, or it ended in this instant
            return outcome.result()
        raise timed_out(downstream, allowed, "its thread goes on by itself") from None
    finally:
        if left_behind is not None and not outcome.done():
            left_behind(outcome)


async def in_loop(call: Callable[[], Awaitable[T]], *, allowed: float, downstream: str) -> T:
    """Await *call*, cancelled after *allowed* seconds with DownstreamTimeout."""
    import asyncio

    try:
        async with asyncio.timeout(allowed) as bound:
            return await call()
    except TimeoutError:
        if bound.expired():
            raise timed_out(downstream, allowed, "it was cancelled") from None
        raise


def tells_of_time(exc: BaseException) -> bool:
    """Whether *exc* says that something took too long, whosever timeout it is."""
    return isinstance(exc, (TimeoutError, DownstreamTimeout)) or any("Timeout" in c.__name__ for c in type(exc).__mro__)


def timed_out(downstream: str, allowed: float, what: str) -> DownstreamTimeout:
    """The error of a call that took too long."""
    return DownstreamTimeout(
        f"{downstream}: no answer within {allowed:.3g} s; {what}. Raise Timeout(total=...), or the task's deadline",
        downstream=downstream,
    )
