"""The tries of one call: each under its timeout, with short waits in between.

Only short waits are slept (`LONGEST_WAIT`), because a worker's slot waits with them: what needs longer is raised, and a
reliable task that retries then rests in the store. A wait that the budget does not allow is not begun. Each further try
takes a permit of the rate again, because the downstream sees it as a call; it keeps the place and the circuit's pass.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from taskguard.clock import seconds, wall_clock
from taskguard.downstream import timeouts
from taskguard.downstream.admittance import Pass
from taskguard.downstream.tallies import Tally
from taskguard.errors import ConfigurationError, Refused, TaskOutcome
from taskguard.policies.calls import Timeout
from taskguard.policies.retry import Retry, RetryEvent
from taskguard.record import Reason
from taskguard.retry import BudgetKeeper, RetryIn, decide

logger = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_WAIT = 1.0
"""Seconds between two tries, at most."""


class Tries:
    """Runs calls to one downstream, again and again where that helps."""

    def __init__(
        self, name: str, retry: Retry | None, timeout: Timeout | None, *, again: Tally, exhausted: Tally, late: Tally
    ) -> None:
        self.name, self.timeout = name, timeout
        self.retry = None if retry is None else _short(retry)
        self.budget = None if retry is None or retry.budget is None else BudgetKeeper(retry.budget)
        self.total = None if timeout is None or timeout.total is None else seconds(timeout.total)
        self._again, self._exhausted, self._late = again, exhausted, late

    def guard(self, fn: Callable[..., T]) -> Callable[..., T]:
        """*fn*, retried and nothing else. What a call costs that succeeds at once, all of it, is here."""
        record = None if self.budget is None else self.budget.record_try

        @functools.wraps(fn)
        def tried(*args: Any, **kwargs: Any) -> T:
            if record is not None:
                record()
            try:
                return fn(*args, **kwargs)
            except Exception as exc:  # noqa: BLE001 (raised again where no try is left)
                error = exc
            return self._run_again(error, fn, args, kwargs, None, None)

        return tried

    def run(
        self,
        fn: Callable[..., T],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        passed: Pass,
        pay: Callable[[], None] | None,
    ) -> T:
        """``fn(*args, **kwargs)``. *pay* takes what a further try costs, or raises Refused. *passed* is told
        of a try that was late.
        """
        if self.budget is not None:
            self.budget.record_try()
        try:
            return self._try(fn, args, kwargs, passed)
        except Exception as exc:
            if self.retry is None:
                raise
            error = exc
        return self._run_again(error, fn, args, kwargs, passed, pay)

    def _run_again(
        self,
        error: Exception,
        fn: Callable[..., T],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        passed: Pass | None,
        pay: Callable[[], None] | None,
    ) -> T:
        waits = self._waits(error)
        wait = next(waits)
        while True:
            if wait is None:
                raise error
            time.sleep(wait)
            try:
                self._pay(pay, error)
                return self._try(fn, args, kwargs, passed)
            except Exception as exc:  # noqa: BLE001 (raised again where no try is left)
                error = exc
            wait = waits.send(error)

    async def arun(
        self,
        fn: Callable[..., Awaitable[T]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        passed: Pass,
        pay: Callable[[], Awaitable[None]] | None,
    ) -> T:
        """The same for an async function."""
        if self.budget is not None:
            self.budget.record_try()
        try:
            return await self._atry(fn, args, kwargs, passed)
        except Exception as exc:
            if self.retry is None:
                raise
            error = exc
        waits = self._waits(error)
        wait = next(waits)
        while True:
            if wait is None:
                raise error
            await asyncio.sleep(wait)
            try:
                if pay is not None:
                    try:
                        await pay()
                    except Refused:
                        raise error from None
                return await self._atry(fn, args, kwargs, passed)
            except Exception as exc:  # noqa: BLE001 (raised again where no try is left)
                error = exc
            wait = waits.send(error)

    @staticmethod
    def _pay(pay: Callable[[], None] | None, error: Exception) -> None:
        if pay is None:
            return
        try:
            pay()
        except Refused:
            raise error from None  # what went wrong is told, not that there was no permit to try it again

    def _waits(self, error: Exception) -> Generator[float | None, Exception, None]:
        """The wait before each further try; None: there is none."""
        assert self.retry is not None
        retries, previous = 0, None
        before: Exception | None = None
        while True:
            if error is before or ends_the_caller(error):
                yield None
                return
            decision = decide(
                self.retry, error, retries=retries, previous=previous, now=wall_clock(), budget=self.budget
            )
            left = timeouts.remaining()
            if not isinstance(decision, RetryIn):
                if decision.reason is Reason.MAX_RETRIES:
                    self._exhausted.add()
                yield None
                return
            if decision.delay > LONGEST_WAIT or (left is not None and decision.delay >= left):
                self._exhausted.add()
                yield None
                return
            retries, previous, before = retries + 1, decision.delay, error
            self._again.add()
            self._tell(retries, error, decision.delay)
            error = yield decision.delay

    def _tell(self, attempt: int, error: BaseException, delay: float) -> None:
        assert self.retry is not None
        if self.retry.on_retry is None:
            return
        try:
            self.retry.on_retry(RetryEvent(task=self.name, task_id="", attempt=attempt, error=error, delay=delay))
        except Exception:
            logger.exception("on_retry of downstream %s failed", self.name)

    def _try(self, fn: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any], passed: Pass | None) -> T:
        if self.timeout is None:
            return fn(*args, **kwargs)
        timeouts.check(self.name)
        with self._timed(passed), timeouts.budget(self.total) as allowed:
            if self.timeout.thread and allowed is not None:
                left = None if passed is None else passed.leave_behind
                return timeouts.in_thread(fn, args, kwargs, allowed=allowed, downstream=self.name, left_behind=left)
            return fn(*args, **kwargs)

    async def _atry(
        self, fn: Callable[..., Awaitable[T]], args: Sequence[Any], kwargs: Mapping[str, Any], passed: Pass
    ) -> T:
        if self.timeout is None:
            return await self._awaitable(fn, args, kwargs)
        timeouts.check(self.name)
        with self._timed(passed), timeouts.budget(self.total) as allowed:
            if allowed is None:
                return await self._awaitable(fn, args, kwargs)
            return await timeouts.in_loop(
                lambda: self._awaitable(fn, args, kwargs), allowed=allowed, downstream=self.name
            )

    def _awaitable(
        self, fn: Callable[..., Awaitable[T]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Awaitable[T]:
        made = fn(*args, **kwargs)
        if not inspect.isawaitable(made):
            raise ConfigurationError(f"{self.name}: {fn!r} is not async; use call, or the decorator")
        return made

    @contextmanager
    def _timed(self, passed: Pass | None) -> Iterator[None]:
        """One try, which is late where it took longer than ``total``, however it ended."""
        began = time.monotonic()
        ended: Exception | None = None
        try:
            yield
        except Exception as exc:
            ended = exc
            raise
        finally:
            late = self.total is not None and time.monotonic() - began > self.total
            if passed is not None:
                passed.late = late
            if late or ended is not None:
                self.count(ended, late=late)

    def count(self, exc: BaseException | None, *, late: bool = False) -> None:
        """A try ended with *exc*, which may be a timeout, or was *late* and ended by itself."""
        if late or (exc is not None and timeouts.tells_of_time(exc)):
            self._late.add()


def ends_the_caller(exc: BaseException) -> bool:
    """Whether *exc* is about the code that calls and not about the call."""
    if isinstance(exc, (Refused, TaskOutcome, ConfigurationError)):
        return True
    return any(cls.__name__ in ("SoftTimeLimitExceeded", "TaskPredicate") for cls in type(exc).__mro__)


def _short(retry: Retry) -> Retry:
    first = min(seconds(retry.first_delay), LONGEST_WAIT)
    return replace(retry, first_delay=first, max_delay=min(seconds(retry.max_delay), LONGEST_WAIT))
