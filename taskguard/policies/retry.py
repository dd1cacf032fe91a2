"""When a failed task, or a call, runs again, and how many repeats a fleet may afford."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from taskguard.clock import Duration, seconds
from taskguard.errors import ConfigurationError
from taskguard.policies.checks import exceptions, number, one_of

Backoff = Literal["exponential", "fixed"]
Jitter = Literal["full", "decorrelated", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEvent:
    """What ``on_retry`` is told. ``attempt`` counts runs from 1; ``delay`` is the wait in seconds that now begins."""

    task: str
    task_id: str
    attempt: int
    error: BaseException
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds retries to a share of first tries, so that an outage is not answered with a multiple of the load.

    Within any *window*, at most ``ratio`` retries per first try, and ``min_per_second`` retries a second on top, so
    that a task that runs rarely can retry at all. Counted in each process of a worker. Source: Finagle's RetryBudget.
    """

    ratio: float = 0.2
    min_per_second: float = 1.0
    window: Duration = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", number("Budget.ratio", self.ratio, least=0.0))
        floor = number("Budget.min_per_second", self.min_per_second, least=0.0)
        object.__setattr__(self, "min_per_second", floor)
        object.__setattr__(self, "window", seconds(self.window, what="Budget.window"))
        if self.window == 0:
            raise ConfigurationError("Budget.window: 0 counts nothing; give more than zero seconds")
        if self.ratio == 0 and self.min_per_second * seconds(self.window) < 1:
            raise ConfigurationError(
                f"Budget: ratio 0 and min_per_second {self.min_per_second!r} never allow a retry within "
                f"window {self.window!r}; raise one of them, or say Retry(max_retries=0)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a failed task runs again, and after how long.

    max_retries: retries after the first try; None for no bound but the deadline.
    backoff, first_delay, factor, max_delay: the n-th retry waits ``first_delay * factor**(n-1)``, at most
        ``max_delay``; "fixed" waits ``first_delay`` each time.
    jitter: "full" draws from zero up to that wait; "decorrelated" draws from ``first_delay`` up to three times the
        wait before, at most ``max_delay`` (``factor`` plays no part); "none" takes it as it is. Brooker 2015,
        "Exponential Backoff And Jitter".
    retry_on, dont_retry_on: exceptions that are always, or never, retried; the others are classified by
        `taskguard.retry.is_transient`. The never wins.
    retry_if: has the last word on each exception that is not in ``dont_retry_on``.
    on_retry: told before each wait.
    retry_after: honour a Retry-After of the exception or its response as the least wait, up to ``max_retry_after``.
    budget: bounds retries to a share of first tries.
    """

    max_retries: int | None = 3
    backoff: Backoff = "exponential"
    first_delay: Duration = 1.0
    factor: float = 2.0
    max_delay: Duration = 600.0
    jitter: Jitter = "full"
    retry_on: tuple[type[BaseException], ...] = ()
    dont_retry_on: tuple[type[BaseException], ...] = ()
    retry_if: Callable[[BaseException], bool] | None = None
    on_retry: Callable[[RetryEvent], None] | None = None
    retry_after: bool = True
    max_retry_after: Duration = 3600.0
    budget: Budget | None = None

    def __post_init__(self) -> None:
        for name in ("first_delay", "max_delay", "max_retry_after"):
            object.__setattr__(self, name, seconds(getattr(self, name), what=f"Retry.{name}"))
        object.__setattr__(self, "factor", number("Retry.factor", self.factor, least=1.0))
        object.__setattr__(self, "retry_on", exceptions("Retry.retry_on", self.retry_on))
        object.__setattr__(self, "dont_retry_on", exceptions("Retry.dont_retry_on", self.dont_retry_on))
        _max_retries(self.max_retries)
        one_of("Retry.backoff", self.backoff, get_args(Backoff))
        one_of("Retry.jitter", self.jitter, get_args(Jitter))
        for name in ("retry_if", "on_retry"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigurationError(f"Retry.{name}: {value!r} cannot be called; give a function or None")
        if not isinstance(self.retry_after, bool):
            raise ConfigurationError(
                f"Retry.retry_after: {self.retry_after!r} is neither True nor False; the bound is max_retry_after"
            )
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise ConfigurationError(f"Retry.budget: {self.budget!r} is no Budget; give Budget(ratio=...) or None")
        if seconds(self.max_delay) < seconds(self.first_delay):
            raise ConfigurationError(
                f"Retry.max_delay: {self.max_delay!r} is less than first_delay {self.first_delay!r}; raise it"
            )
        if self.first_delay == 0 and self.max_retries is None:
            raise ConfigurationError("Retry: first_delay 0 with max_retries None never rests; bound one of them")
        if self.backoff == "fixed" and self.jitter == "decorrelated":
            raise ConfigurationError(
                "Retry.jitter: 'decorrelated' grows from wait to wait and cannot be 'fixed'; use 'full' or 'none'"
            )


def _max_retries(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"Retry.max_retries: {value!r} must be a whole number, 0 or more, or None")
