"""The places of a bulkhead, as pure functions: leases by holder, and how long they are held.

The state is ``(hold, {holder: (lease end, taken at)})``; units are those of `limits`. A place whose lease is over
counts no more, so a holder that was killed gives it back by doing nothing. ``hold`` is a moving average over the places
that were given back (a lease that ended says nothing about how long work takes); from it comes what a refused call is
told to wait.
"""

from __future__ import annotations

from math import ceil
from typing import Any

State = tuple[Any, ...]

WEIGHT = 0.2
"""Of the newest hold in the average."""
UNKNOWN = 1e6
"""Microseconds to wait where no place was given back yet."""
SHORTEST = 1e3
SHORTEST_UNKNOWN = 50e3
"""Microseconds to wait at least: where it is known how long places are held, and where it is not."""
KEPT = 3600e6
"""Microseconds for which the average outlives the last lease."""


def acquire(
    state: State | None, now: float, *, holder: str, limit: int, lease: float
) -> tuple[float, State | None, float]:
    """A place for *holder*: the wait (0.0: it has one), the state to write, and until when that says something.

    A holder that has a place keeps it; its lease is prolonged.
    """
    hold, leases = _live(state, now)
    end, taken = leases.get(holder, (0.0, now))
    if holder not in leases and len(leases) >= limit:
        soonest = min(lease_end for lease_end, _ in leases.values()) - now
        least = SHORTEST if hold else SHORTEST_UNKNOWN
        return float(ceil(min(soonest, max(spacing(state, limit), least)))), None, 0.0
    leases[holder] = (max(end, now + lease), taken)
    after = (hold, leases)
    return 0.0, after, until(after, now)


def release(state: State | None, now: float, holder: str) -> State | None:
    """The state without this holder's place; None: it has none."""
    hold, leases = _live(state, now)
    if holder not in leases:
        return None
    _, taken = leases.pop(holder)
    held = now - taken
    return (hold + WEIGHT * (held - hold) if hold else held), leases


def renew(state: State | None, now: float, *, holder: str, lease: float) -> State | None:
    """The state with this holder's lease prolonged; None: it has no place."""
    hold, leases = _live(state, now)
    if holder not in leases:
        return None
    end, taken = leases[holder]
    leases[holder] = (max(end, now + lease), taken)
    return hold, leases


def spacing(state: State | None, limit: int) -> float:
    """Microseconds from one place that becomes free to the next, as far as is known."""
    hold = state[0] if state is not None else 0.0
    return float(hold / limit) if hold else UNKNOWN / limit


def until(state: State, now: float) -> float:
    """When this state says nothing any more."""
    return max((float(end) for end, _ in state[1].values()), default=now) + KEPT


def _live(state: State | None, now: float) -> tuple[float, dict[str, tuple[float, float]]]:
    if state is None:
        return 0.0, {}
    # `taken` may lie ahead by the skew of another process's clock; nothing was held for less than no time.
    return state[0], {holder: (end, min(taken, now)) for holder, (end, taken) in state[1].items() if end > now}
