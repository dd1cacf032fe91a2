"""Retry decisions: is this error worth another run, after how long, and is one still allowed.

Pure but for `BudgetKeeper`, which counts. The order of the questions: is the error worth it, is the count used up, is
the budget used up. Only then is a wait drawn.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from taskguard.clock import seconds
from taskguard.policies import Budget, Retry
from taskguard.record import Reason
from taskguard.transient import is_transient, retry_after

__all__ = [
    "BudgetKeeper",
    "Decision",
    "GiveUp",
    "RetryIn",
    "Rng",
    "decide",
    "delay",
    "is_transient",
    "retry_after",
]


class Rng(Protocol):
    """A source of randomness: a ``random.Random``, or the ``random`` module, which every forked child seeds anew."""

    def uniform(self, a: float, b: float, /) -> float:
        """A number between *a* and *b*."""


@dataclass(frozen=True, slots=True)
class RetryIn:
    """Run it again after ``delay`` seconds."""

    delay: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Dead-letter it with ``reason``; ``why`` is one line for people."""

    reason: Reason
    why: str


Decision = RetryIn | GiveUp


class BudgetKeeper:
    """The counter behind a `Budget`, for one task in one process. Thread-safe; *clock* is in seconds and monotonic."""

    SLICES = 10

    def __init__(self, budget: Budget, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ratio = budget.ratio
        self._slice = seconds(budget.window) / self.SLICES
        self._reserve = budget.min_per_second * seconds(budget.window)
        self._clock = clock
        self._lock = threading.Lock()
        self._slices: deque[tuple[int, float]] = deque()

    def record_try(self) -> None:
        """A first try begins."""
        with self._lock:
            self._add(self._ratio)

    def spend(self) -> bool:
        """Take one retry from the budget. False, and nothing is taken, when none is left."""
        with self._lock:
            index = self._add(0.0)
            while self._slices[0][0] <= index - self.SLICES:
                self._slices.popleft()
            balance = self._reserve + sum(amount for _, amount in self._slices)
            if balance < 1 - 1e-9:
                return False
            self._add(-1.0)
            return True

    def _add(self, amount: float) -> int:
        index = int(self._clock() / self._slice)
        if self._slices and self._slices[-1][0] >= index:
            index, before = self._slices.pop()
            amount += before
        self._slices.append((index, amount))
        if len(self._slices) > self.SLICES:
            self._slices.popleft()
        return index


def decide(
    policy: Retry,
    exc: BaseException,
    *,
    retries: int,
    previous: float | None,
    now: float,
    rng: Rng = random,
    budget: BudgetKeeper | None = None,
) -> Decision:
    """What follows *exc*, raised by a run that was retried *retries* times already.

    *previous* is the wait before that run, None for the first; *now* is epoch seconds. A retry is taken from *budget*
    only when nothing else stands against it. Never raises: a ``retry_if`` that fails dead-letters the task, with both
    errors named, because its author's answer is not known.
    """
    try:
        retryable = _retryable(policy, exc)
    except Exception as broken:  # noqa: BLE001 - user code; the task's own error must not be lost to it
        why = f"retry_if raised {type(broken).__name__}: {broken} when asked about {_describe(exc)}"
        return GiveUp(Reason.PERMANENT_ERROR, why)
    if not retryable:
        return GiveUp(Reason.PERMANENT_ERROR, f"{_describe(exc)} is not worth a retry")
    if policy.max_retries is not None and retries >= policy.max_retries:
        return GiveUp(Reason.MAX_RETRIES, f"all {policy.max_retries} retries are used up; the last: {_describe(exc)}")
    if budget is not None and not budget.spend():
        return GiveUp(Reason.MAX_RETRIES, f"the retry budget is used up; the last: {_describe(exc)}")
    wait = delay(policy, retries=retries, previous=previous, rng=rng)
    floor = retry_after(exc, now) if policy.retry_after else None
    if floor is not None:
        floor = min(floor, seconds(policy.max_retry_after))
        if wait < floor:
            # All who were refused were told the same moment: the jitter goes on top of it, or they come back as one.
            wait = floor if policy.jitter == "none" else floor + wait
    return RetryIn(wait)


def delay(policy: Retry, *, retries: int, previous: float | None, rng: Rng = random) -> float:
    """The wait in seconds before the next run, after *retries* retries; *previous* is the wait before this one."""
    first, longest = seconds(policy.first_delay), seconds(policy.max_delay)
    if policy.jitter == "decorrelated":
        return min(longest, rng.uniform(first, max(first, 3 * (first if previous is None else previous))))
    ceiling = first
    if policy.backoff == "exponential":
        try:
            ceiling = min(longest, first * policy.factor**retries)
        except OverflowError:
            ceiling = min(longest, first and longest)
    return rng.uniform(0.0, ceiling) if policy.jitter == "full" else ceiling


def _retryable(policy: Retry, exc: BaseException) -> bool:
    if isinstance(exc, policy.dont_retry_on):
        return False
    if policy.retry_if is not None:
        return bool(policy.retry_if(exc))
    return isinstance(exc, policy.retry_on) or is_transient(exc)


def _describe(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"[:200]
