"""The rates as pure functions: what a limit's state becomes and whether a call may go. The specification of all stores.

Instants and durations are doubles of microseconds (`clock.to_us`), reckoned with the same operations in the same order
in Python and in Lua, so that every store gives the same answer to the last bit. ``now`` is a whole number.

- A wait is exact: after that long the call is admitted, a microsecond earlier it is not. Where rounding could be off
  by one, the rule itself is asked.
- A refused call changes nothing. The one exception mends the state: where it lies further ahead than `SKEW`, the
  server's clock was set back, and it is moved to now; what was used stays used, for one period at most.
- A state that lies ahead by less was written by a process whose notion of the server's clock is a little fast: time
  stands still until it is reached. So two processes that disagree around a window's edge cannot both have its permits.

The bucket keeps its backlog and the instant it was true, not a theoretical arrival time: the sum would lose a part in
a thousand at 100,000 permits a second, because a double that holds years keeps a hundredth of a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import ceil, fmod
from typing import Any, Literal, NamedTuple, assert_never

from taskguard.clock import span_us
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket

Kind = Literal["bucket", "fixed", "sliding", "log"]
State = tuple[Any, ...]

SKEW = 1e6
"""Microseconds by which two processes may disagree about the server's clock."""
ROUNDED = 1.0 + 2.0**-32
"""Seven sevenths of a bucket, added up, may be a little more than one; the rounding of a million is less than this."""
SINCE_1970 = 1_735_689_600e6
"""Microseconds from 1970, whose multiples are the edges of windows, to the instant 0.0."""


class Terms(NamedTuple):
    """A rate in numbers, in the order in which Lua gets them."""

    kind: Kind
    limit: float
    period: float
    burst: float
    most: float

    @property
    def interval(self) -> float:
        """Microseconds from one permit to the next."""
        return self.period / self.limit

    def adapted(self, limit: float) -> Terms:
        """The same with another limit: the burst, or what a window holds, goes with it, and is never below 1."""
        burst = max(self.burst * (limit / self.limit), 1.0) if self.burst > 1.0 else self.burst
        return self._replace(limit=limit if self.kind == "bucket" else max(limit, 1.0), burst=burst)


class Verdict(NamedTuple):
    """wait: 0.0 admits, None never will. state: what to write if all others admit too, or, where this one refuses, the
    mended state; None: nothing. until: when that state says nothing any more."""

    wait: float | None
    state: State | None = None
    until: float = 0.0


class Room(NamedTuple):
    """What is left: permits, and microseconds until all are back."""

    remaining: float
    reset: float


@lru_cache(1024)
def terms_of(policy: Rate) -> Terms:
    """The numbers of a declaration."""
    period = span_us(policy.period)
    match policy:
        case TokenBucket():
            return Terms("bucket", policy.limit, period, policy.most, policy.most)
        case LeakyBucket():
            return Terms("bucket", policy.limit, period, 1.0, policy.most)
        case FixedWindow():
            return Terms("fixed", policy.limit, period, 1.0, policy.most)
        case SlidingWindow():
            return Terms("sliding", policy.limit, period, 1.0, policy.most)
        case SlidingLog():
            return Terms("log", policy.limit, period, 1.0, policy.most)
    assert_never(policy)


def decide(terms: Terms, state: State | None, now: float, cost: float) -> Verdict:
    """Whether a call of this cost may go now, and what the state is then."""
    if cost > terms.most:
        return Verdict(None)
    match terms.kind:
        case "bucket":
            return _bucket(terms, state, now, cost)
        case "fixed":
            return _fixed(terms, state, now, cost)
        case "sliding":
            return _sliding(terms, state, now, cost)
        case "log":
            return _log(terms, state, now, cost)
    assert_never(terms.kind)


def room(terms: Terms, state: State | None, now: float) -> Room:
    """What this limit has left, for people and headers: whole permits."""
    match terms.kind:
        case "bucket":
            time, held, _ = _bucket_at(terms, state, now)
            left, reset = (terms.burst * terms.interval - held) / terms.interval, time - now + held if held else 0.0
        case "fixed":
            time, start, used, _ = _fixed_at(terms, state, now)
            left, reset = terms.limit - used, start + terms.period - now if used else 0.0
        case "sliding":
            time, start, used, before, _ = _sliding_at(terms, state, now)
            left = terms.limit - used - before * ((start + terms.period - time) / terms.period)
            reset = start + terms.period * (2.0 if used else 1.0) - now if used or before else 0.0
        case "log":
            time, total, entries, _ = _log_at(terms, state, now)
            left, reset = terms.limit - total, entries[-1][0] + terms.period - now if entries else 0.0
        case _:
            assert_never(terms.kind)
    # A third of a second is no double: 1.9999999 permits are two.
    return Room(float(max(int(left + 1e-6), 0)), float(ceil(reset)))


def _exact(wait: float, fits: Callable[[float], bool]) -> float:
    """The least whole wait that fits, where *wait* is it but for rounding."""
    whole = float(ceil(wait))
    if not fits(whole):
        return whole + 1.0
    return whole - 1.0 if fits(whole - 1.0) else whole


def _bucket(terms: Terms, state: State | None, now: float, cost: float) -> Verdict:
    time, held, mended = _bucket_at(terms, state, now)
    need, most = cost * terms.interval, max(terms.burst, cost) * terms.interval * ROUNDED
    if held + need <= most:
        return Verdict(0.0, (time, held + need), time + held + need)
    wait = _exact(held + need - most, lambda later: max(held - later, 0.0) + need <= most)
    return Verdict(wait + (time - now), (time, held) if mended else None, time + held)


def _bucket_at(terms: Terms, state: State | None, now: float) -> tuple[float, float, bool]:
    """The instant that counts as now, the backlog then, whether the state has to be mended."""
    at, backlog = state or (now, 0.0)
    mended = at - now > SKEW
    if mended:
        at = now
    time = max(at, now)
    held = max(backlog - (time - at), 0.0)
    most = max(terms.burst, terms.most) * terms.interval
    return (time, most, True) if held > most * ROUNDED else (time, held, mended)


def _fixed(terms: Terms, state: State | None, now: float, cost: float) -> Verdict:
    _, start, used, mended = _fixed_at(terms, state, now)
    end = start + terms.period
    if used + cost <= max(terms.limit, cost):
        return Verdict(0.0, (start, used + cost), end)
    return Verdict(end - now, (start, used) if mended else None, end)


def _fixed_at(terms: Terms, state: State | None, now: float) -> tuple[float, float, float, bool]:
    start, used = state or (now, 0.0)
    mended = start - now > SKEW
    time = now if mended else max(start, now)
    current = time - fmod(time + SINCE_1970, terms.period)
    return time, current, used if start >= current else 0.0, mended


def _sliding(terms: Terms, state: State | None, now: float, cost: float) -> Verdict:
    time, start, used, before, mended = _sliding_at(terms, state, now)
    left, period, most = start + terms.period - time, terms.period, max(terms.limit, cost)
    until = start + period * 2.0
    if before * (left / period) + used + cost <= most:
        return Verdict(0.0, (start, used + cost, before), until)
    if used + cost <= most:
        wait = _exact(
            left - (most - cost - used) * period / before,
            lambda later: before * ((left - later) / period) + used + cost <= most,
        )
    else:
        wait = _exact(
            left + period - (most - cost) * period / used,
            lambda later: used * ((left + period - later) / period) + cost <= most,
        )
    return Verdict(wait + (time - now), (start, used, before) if mended else None, until)


def _sliding_at(terms: Terms, state: State | None, now: float) -> tuple[float, float, float, float, bool]:
    start, used, before = state or (now, 0.0, 0.0)
    mended = start - now > SKEW
    time = now if mended else max(start, now)
    current = time - fmod(time + SINCE_1970, terms.period)
    if start >= current:
        return time, current, used, before, mended
    return time, current, 0.0, used if current - start <= terms.period else 0.0, mended


def _log(terms: Terms, state: State | None, now: float, cost: float) -> Verdict:
    time, total, entries, mended = _log_at(terms, state, now)
    most = max(terms.limit, cost)
    if total + cost <= most:
        return Verdict(0.0, (total + cost, (*entries, (time, cost))), time + terms.period)
    left, last = total, len(entries) - 1
    for index, (at, spent) in enumerate(entries):
        left = 0.0 if index == last else left - spent
        if left + cost <= most:
            wait = at + terms.period - now
            return Verdict(wait, (total, entries) if mended else None, time + terms.period)
    raise AssertionError(f"a log of {total:g} has no room for {cost:g} even when it is empty")


def _log_at(terms: Terms, state: State | None, now: float) -> tuple[float, float, State, bool]:
    """``total`` is what the entries cost, taken off in their order; an empty log has none, whatever was rounded."""
    total, entries = state or (0.0, ())
    if not entries:
        return now, 0.0, (), False
    newest = entries[-1][0]
    if newest - now > SKEW:
        return now, total, ((now, total),), True
    time, gone = max(newest, now), 0
    for at, spent in entries:
        if at > time - terms.period:
            break
        total -= spent
        gone += 1
    entries = tuple(entries[gone:])
    return time, total if entries else 0.0, entries, False
