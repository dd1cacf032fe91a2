"""When calls to something that fails are stopped, and how they begin again. The vocabulary is Resilience4j's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from taskguard.clock import Duration, seconds
from taskguard.errors import ConfigurationError
from taskguard.policies.checks import exceptions, number, one_of

CircuitState = Literal["closed", "open", "half_open", "forced_open", "forced_closed", "disabled"]
OnOpen = Literal["defer", "fallback", "dead_letter", "pause_queue"]
Window = Literal["time", "count"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitChange:
    """What ``on_change`` is told: the circuit's name, where it came from and went to, and why."""

    name: str
    before: CircuitState
    after: CircuitState
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitBreaker:
    """Opens when too many of the fleet's recent calls failed or were slow, and lets probes find out when to close.

    failure_rate_threshold: share of failed calls in the window, above 0 up to 1, from which the circuit opens.
    slow_call_rate_threshold, slow_call_duration: the same for calls that took longer than so many seconds; None: never.
    minimum_calls: below this many calls in the window nothing trips.
    window, window_size: "time": the last so many seconds; "count": the last so many calls; the whole fleet's.
    wait_in_open: seconds until the first probe; times ``backoff`` for each time that the probes failed, up to
        ``max_wait_in_open``.
    probes_in_half_open: probes under way at once, in the whole fleet. success_threshold: probes that must succeed
        before it closes. probe_lease: seconds after which a probe that says nothing (its process died) counts no more.
    expected: exceptions that are failures; ignored: exceptions that are neither failure nor success. The ignored wins.
    slow_start: seconds after closing over which the admitted share of parked tasks grows to all.
    on_open: what becomes of a task that declares the downstream: "defer" (parked until the first probe can go),
        "fallback", "dead_letter", or "pause_queue" (every worker stops consuming its queue until then).
    on_change: told in each process that sees a change.
    """

    failure_rate_threshold: float = 0.5
    slow_call_rate_threshold: float | None = None
    slow_call_duration: Duration | None = None
    minimum_calls: int = 10
    window: Window = "time"
    window_size: Duration = 60.0
    wait_in_open: Duration = 30.0
    backoff: float = 2.0
    max_wait_in_open: Duration = 600.0
    probes_in_half_open: int = 1
    success_threshold: int = 1
    probe_lease: Duration = 30.0
    expected: tuple[type[BaseException], ...] = (Exception,)
    ignored: tuple[type[BaseException], ...] = ()
    slow_start: Duration = 10.0
    on_open: OnOpen = "defer"
    on_change: Callable[[CircuitChange], None] | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        keep("failure_rate_threshold", _share("failure_rate_threshold", self.failure_rate_threshold))
        if (self.slow_call_rate_threshold is None) != (self.slow_call_duration is None):
            raise ConfigurationError(
                "CircuitBreaker: slow_call_rate_threshold and slow_call_duration are of use only together; give both"
            )
        if self.slow_call_rate_threshold is not None:
            keep("slow_call_rate_threshold", _share("slow_call_rate_threshold", self.slow_call_rate_threshold))
        names = ["window_size", "wait_in_open", "max_wait_in_open", "probe_lease", "slow_start"]
        for name in [*names, *(["slow_call_duration"] if self.slow_call_duration is not None else [])]:
            keep(name, seconds(getattr(self, name), what=f"CircuitBreaker.{name}"))
        for name in ("minimum_calls", "probes_in_half_open", "success_threshold"):
            _whole(name, getattr(self, name))
        keep("backoff", number("CircuitBreaker.backoff", self.backoff, least=1.0))
        one_of("CircuitBreaker.window", self.window, get_args(Window))
        one_of("CircuitBreaker.on_open", self.on_open, get_args(OnOpen))
        keep("expected", exceptions("CircuitBreaker.expected", self.expected))
        keep("ignored", exceptions("CircuitBreaker.ignored", self.ignored))
        if self.on_change is not None and not callable(self.on_change):
            raise ConfigurationError(f"CircuitBreaker.on_change: {self.on_change!r} cannot be called; give a function")
        for name in ("window_size", "wait_in_open", "probe_lease"):
            if getattr(self, name) == 0:
                raise ConfigurationError(f"CircuitBreaker.{name}: 0 decides nothing; give more than zero")
        if seconds(self.max_wait_in_open) < seconds(self.wait_in_open):
            raise ConfigurationError(
                f"CircuitBreaker.max_wait_in_open: {self.max_wait_in_open!r} is less than wait_in_open "
                f"{self.wait_in_open!r}; raise it"
            )
        if self.window == "count":
            size = float(seconds(self.window_size))
            if size != int(size):
                raise ConfigurationError(f"CircuitBreaker.window_size: {size!r} calls; give a whole number")
            for name in ("minimum_calls", "probes_in_half_open"):
                if getattr(self, name) > size:
                    raise ConfigurationError(
                        f"CircuitBreaker.{name}: {getattr(self, name)} is over the window of {size:g} calls and could "
                        "never be reached; lower it or raise window_size"
                    )


def _share(name: str, value: object) -> float:
    share = number(f"CircuitBreaker.{name}", value, least=0.0)
    if not 0 < share <= 1:
        raise ConfigurationError(
            f"CircuitBreaker.{name}: {value!r} is no share; give more than 0, up to 1 (0.5 is half)"
        )
    return share


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"CircuitBreaker.{name}: {value!r} must be a whole number, 1 or more")
