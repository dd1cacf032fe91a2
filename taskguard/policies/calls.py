"""What surrounds one call to a downstream: how many at once, for how long, and what is given instead of an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from taskguard.clock import Duration, seconds
from taskguard.errors import ConfigurationError
from taskguard.policies.adaptive import Adaptive
from taskguard.policies.checks import exceptions
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket

_RATES = (TokenBucket, LeakyBucket, FixedWindow, SlidingWindow, SlidingLog, Adaptive)

Key = str | Callable[..., object]
"""A template over the call's arguments, as ``"{tenant}"``, or a function of them."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A rate with a name of its own, and one state per key where *key* says whose call it is (a tenant, a client).

    name: what the store and the refusals call it; within one downstream, "" is the downstream's own name.
    key: a template over the call's arguments by name (``"{tenant}"``), or a function of them; None: one for all.
    """

    policy: Rate | Adaptive
    name: str = ""
    key: Key | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, _RATES):
            raise ConfigurationError(f"Limit: {self.policy!r} is no rate; give TokenBucket(100, per=1) or another")
        if not isinstance(self.name, str):
            raise ConfigurationError(f"Limit.name: {self.name!r} is no text; give a word")
        if self.key is not None and not isinstance(self.key, str) and not callable(self.key):
            raise ConfigurationError(
                f"Limit.key: {self.key!r} finds no key; give a template such as '{{tenant}}' or a function"
            )
        if self.key is not None and isinstance(self.policy, Adaptive):
            raise ConfigurationError(
                "Limit: an Adaptive limit adapts for all calls alike; leave key out, or give a rate"
            )
        if isinstance(self.key, str) and "{" not in self.key:
            raise ConfigurationError(
                f"Limit.key: {self.key!r} names no argument, so all calls would share it; give '{{argument}}', "
                "or name= where one limit for all is meant"
            )


@dataclass(frozen=True, slots=True)
class Concurrency:
    """How many calls may be under way at once.

    limit: places, in the whole fleet; with ``local``, in this process (then nothing is asked of the store).
    lease: seconds after which a place whose process was killed comes back. Living processes renew theirs.
    max_wait: seconds a call waits for a place before it is refused; never past its deadline.
    """

    limit: int
    lease: Duration = 30.0
    max_wait: Duration = 0.0
    local: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1:
            raise ConfigurationError(f"Concurrency.limit: {self.limit!r} must be a whole number, 1 or more")
        for name in ("lease", "max_wait"):
            object.__setattr__(self, name, seconds(getattr(self, name), what=f"Concurrency.{name}"))
        if seconds(self.lease) < 0.1:
            raise ConfigurationError(
                f"Concurrency.lease: {self.lease!r} ends before it can be renewed; give 0.1 s or more"
            )
        if not isinstance(self.local, bool):
            raise ConfigurationError(f"Concurrency.local: {self.local!r} is neither True nor False")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """How long one try of a call may take; never longer than what is left of the budget it runs in.

    connect, read: for the transports of `taskguard.clients`; None: what is left of ``total``.
    total: seconds for one try, all in all, and the budget of what it calls in turn. It ends async code; sync code ends
        by itself or by its transport. Sync code that returns later than this has failed, for the circuit and the
        figures, and its value is returned all the same: the work is done. The body of a task with ``downstream=`` and
        a block of ``permit()`` are such a try too.
    thread: run sync code in a thread and leave it there when the time is over. See `timeouts.in_thread` for what
        that cannot do.
    """

    connect: Duration | None = None
    read: Duration | None = None
    total: Duration | None = None
    thread: bool = False

    def __post_init__(self) -> None:
        names = [name for name in ("connect", "read", "total") if getattr(self, name) is not None]
        if not names:
            raise ConfigurationError("Timeout: without connect, read or total nothing ends; give one of them")
        for name in names:
            value = seconds(getattr(self, name), what=f"Timeout.{name}")
            object.__setattr__(self, name, value)
            if value == 0:
                raise ConfigurationError(f"Timeout.{name}: 0 lets no call through; give more than zero seconds")
        for name in ("connect", "read"):
            if name in names and self.total is not None and getattr(self, name) > self.total:
                raise ConfigurationError(
                    f"Timeout.{name}: {getattr(self, name):g} s is longer than total {self.total:g} s and can never "
                    "be reached; lower it"
                )
        if self.thread and self.total is None:
            raise ConfigurationError("Timeout.thread: without total there is nothing to wait for; give total=")


class Cache(Protocol):
    """Where `Stale` keeps the last good answers."""

    def get(self, key: str) -> tuple[float, Any] | None:
        """The value under *key* and its age in seconds, as (age, value)."""

    def put(self, key: str, value: Any) -> None:
        """Keep it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """The last good answer to the same question, not older than *max_age* seconds.

    key: a template or a function over the arguments; None: all of them. cache: where answers are kept; None: in
    this process, at most 1,024 of them. with_age: give ``(value, age)`` instead of the value.
    """

    max_age: Duration
    key: Key | None = None
    cache: Cache | None = None
    with_age: bool = False

    kind = "stale"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_age", seconds(self.max_age, what="Stale.max_age"))
        if self.max_age == 0:
            raise ConfigurationError("Stale.max_age: 0 keeps nothing; give more than zero seconds")
        if self.key is not None and not isinstance(self.key, str) and not callable(self.key):
            raise ConfigurationError(f"Stale.key: {self.key!r} finds no key; give a template or a function")


@dataclass(frozen=True, slots=True)
class Default:
    """This value. The same object each time: give one that nobody changes."""

    value: Any

    kind = "default"


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another service's answer: *fn* is called with the call's own arguments."""

    fn: Callable[..., Any]

    kind = "alternative"

    def __post_init__(self) -> None:
        _callable("Alternative", self.fn)


@dataclass(frozen=True, slots=True)
class Degraded:
    """Less than was asked for: *fn* is called with the error, then with the call's own arguments."""

    fn: Callable[..., Any]

    kind = "degraded"

    def __post_init__(self) -> None:
        _callable("Degraded", self.fn)


@dataclass(frozen=True, slots=True)
class QueueForLater:
    """The work is queued and *answer* is given. *work*: a task, a signature (``apply_async``), or a function.

    A task or a function receives the call's arguments; a signature receives them as further ones.
    """

    work: Any
    answer: Any = None

    kind = "queued"

    def __post_init__(self) -> None:
        if not callable(getattr(self.work, "apply_async", None)):
            _callable("QueueForLater", self.work)


FallbackPart = Stale | Default | Alternative | Degraded | QueueForLater


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackEvent:
    """What ``on_fallback`` is told: which link answered for which downstream, and what made it necessary."""

    downstream: str
    kind: str
    error: BaseException


@dataclass(frozen=True, slots=True, init=False)
class Fallback:
    """What is given instead of an answer: the first of *parts* that can, in order.

    on: exceptions that lead here; every other one is raised as it is. None: a refusal, a timeout, and what the
        downstream's circuit expects as failure.
    on_fallback: told each time, with which part answered and why. What it raises is logged.
    """

    parts: tuple[FallbackPart, ...]
    on: tuple[type[BaseException], ...] | None
    on_fallback: Callable[[FallbackEvent], None] | None

    def __init__(
        self,
        *parts: FallbackPart,
        on: type[BaseException] | tuple[type[BaseException], ...] | None = None,
        on_fallback: Callable[[FallbackEvent], None] | None = None,
    ) -> None:
        if not parts:
            raise ConfigurationError("Fallback: no part answers; give Default(...), Stale(...) or another")
        for part in parts:
            if not isinstance(part, (Stale, Default, Alternative, Degraded, QueueForLater)):
                raise ConfigurationError(
                    f"Fallback: {part!r} is no part of one; give Stale, Default, Alternative, Degraded or QueueForLater"
                )
        for part in parts[:-1]:
            if isinstance(part, Default):
                raise ConfigurationError("Fallback: Default always answers, so what follows it never does; put it last")
        if on_fallback is not None:
            _callable("Fallback.on_fallback", on_fallback)
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "on", None if on is None else exceptions("Fallback.on", on))
        object.__setattr__(self, "on_fallback", on_fallback)


Rates = Rate | Adaptive | Limit | list[Any] | tuple[Any, ...] | Mapping[str, Any]
"""What ``Downstream(rate=)`` takes: one, several that are stacked, or several by name."""


def limits(rate: Rates | None, name: str) -> tuple[Limit, ...]:
    """The limits of the downstream *name*, each with the name the store keeps it under."""
    if rate is None:
        return ()
    if isinstance(rate, Mapping):
        given = [_named(value, str(key)) for key, value in rate.items()]
    elif isinstance(rate, (list, tuple)):
        given = [_named(value, "") for value in rate]
    else:
        given = [_named(rate, "")]
    if not given:
        raise ConfigurationError(f"{name}: an empty rate limits nothing; leave rate= out")
    found: list[Limit] = []
    for each in given:
        policy = each.policy
        own = each.name or (name if len(given) == 1 else f"{name}/{_measure(policy)}")
        full = own if own == name or own.startswith(f"{name}/") else f"{name}/{own}"
        found.append(Limit(policy, full + ("/key" if each.key is not None and not each.name else ""), each.key))
    names = [each.name for each in found]
    twice = next((own for own in names if names.count(own) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"{name}: two limits are called {twice!r}; give one of them Limit(..., name=...)")
    return tuple(found)


def _named(value: object, name: str) -> Limit:
    if isinstance(value, Limit):
        return Limit(value.policy, value.name or name, value.key)
    if isinstance(value, _RATES):
        return Limit(value, name)
    said = "is text, which only rules are written in" if isinstance(value, str) else "limits nothing"
    raise ConfigurationError(f"rate: {value!r} {said}; give TokenBucket(100, per=1), Limit(...), or a list of them")


def _measure(policy: Rate | Adaptive) -> str:
    per = policy.period
    return f"{type(policy).__name__.lower()}-{per:g}s"


def _callable(what: str, value: object) -> None:
    if not callable(value):
        raise ConfigurationError(f"{what}: {value!r} cannot be called; give a function")
