"""Instants and durations: the only place that reads the wall clock.

Durations are seconds (``float`` or ``timedelta``) and instants are epoch seconds (``float``) everywhere in taskguard;
at the wire and in stores an instant is an integer of epoch milliseconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from taskguard.errors import ConfigurationError

Clock = Callable[[], float]
Duration = float | timedelta

LATEST = 253_402_300_799
"""The end of the year 9999, epoch seconds: Python's calendar goes no further, and no deadline needs to."""

_PERMITS_BEGAN = 1_735_689_600
"""2025-01-01 UTC, epoch seconds. A double keeps microseconds since then to a hundredth for many years."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*$")
_driver: Clock | None = None


def wall_clock() -> float:
    """Epoch seconds now. Looked up at call time, so that freezegun can move it."""
    return time.time() if _driver is None else _driver()


@contextmanager
def driven_by(clock: Clock) -> Iterator[None]:
    """For tests: `wall_clock` reads *clock* in this whole process, as long as the block is open."""
    global _driver
    before, _driver = _driver, clock
    try:
        yield
    finally:
        _driver = before


def seconds(value: Duration | str, *, what: str = "duration") -> float:
    """Read a duration: seconds, a ``timedelta``, or text such as ``"90"``, ``"15s"``, ``"24h"``.

    Raises ConfigurationError for anything else, and for negative or non-finite values.
    """
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, str):
        match = _DURATION.match(value)
        if match is None:
            raise ConfigurationError(f"{what}: {value!r} is not a duration; write seconds, or 500ms, 15s, 5m, 24h, 7d")
        result = float(match[1]) * _UNITS[match[2] or "s"]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        result = float(value) if abs(value) < 1e11 else float("inf")  # an int may be too large to be a float
    else:
        raise ConfigurationError(f"{what}: {value!r} is not a duration; give seconds or a timedelta")
    if not 0 <= result < 1e11:
        raise ConfigurationError(f"{what}: {value!r} is out of range; give seconds, zero or more")
    return result


def instant(value: Duration | datetime | str, *, now: float, what: str = "deadline") -> float:
    """Read an instant: a ``datetime``, an ISO 8601 text, or a duration counted from *now*. Epoch seconds.

    A ``datetime`` without a zone is taken as UTC, as Celery does by default.
    """
    if isinstance(value, str):
        if _DURATION.match(value):
            return now + seconds(value, what=what)
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ConfigurationError(f"{what}: {value!r} is neither a duration nor an ISO 8601 instant") from None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return now + seconds(value, what=what)


def to_ms(at: float) -> int:
    """An instant as stores and the wire keep it."""
    return round(at * 1000)


def to_us(at: float) -> float:
    """An instant as permits keep it: whole microseconds since 2025, a double, so that Lua reckons with the same."""
    return float(round((at - _PERMITS_BEGAN) * 1e6))


def from_us(us: float) -> float:
    """Inverse of `to_us`."""
    return _PERMITS_BEGAN + us / 1e6


def span_us(duration: float) -> float:
    """A duration in whole microseconds, a double."""
    return float(round(duration * 1e6))


def iso(at: float) -> str:
    """An instant for people: ISO 8601, UTC, to the second. One that no calendar has is told as it is."""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{at:g} s after 1970"
