"""The clock of a rehearsal: it stands still until it is told to move."""

from __future__ import annotations

import math
import time
from typing import Any

from taskguard.clock import Duration, seconds
from taskguard.errors import ConfigurationError


class ManualClock:
    """Epoch seconds that stand still. Begins at the next whole second of the real time, unless told otherwise.

    It drives deadlines, leases, delays and retention, and Celery's own countdowns. Code of yours that reads the time
    itself goes on reading the real one; to move both, freeze the time and let this clock `follow`.
    """

    def __init__(self, at: float | None = None) -> None:
        self._at = float(math.ceil(time.time())) if at is None else at
        self._frozen: Any = None

    def __call__(self) -> float:
        return self._at if self._frozen is None else time.time()

    def advance(self, by: Duration | str) -> float:
        """Move on by *by*: seconds, a ``timedelta``, or text such as ``"15m"``. Returns the new instant."""
        self.move_to(self() + seconds(by, what="advance"))
        return self()

    def move_to(self, at: float) -> None:
        """Move on to an instant; never back."""
        ahead = at - self()
        if ahead <= 0:
            return
        if self._frozen is None:
            self._at = at
        else:
            # Frozen time has whole microseconds; one that fell short would leave what is due just not due.
            self._frozen(math.ceil(ahead * 1e6) / 1e6 + 1e-6)

    def branch(self) -> ManualClock:
        """A clock that begins where this one is and moves without it; frozen time has no second one."""
        return ManualClock(self()) if self._frozen is None else self

    def follow(self, frozen: Any) -> None:
        """Read the frozen time from now on, and move it: freezegun's (``tick``), or time-machine's (``shift``)."""
        tick = getattr(frozen, "tick", None) or getattr(frozen, "shift", None)
        if not callable(tick):
            raise ConfigurationError(
                f"follow: {frozen!r} cannot be moved; give what `freeze_time(...)` returns inside its with block"
            )
        self._frozen = tick
