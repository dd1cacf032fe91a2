"""Refusals of rates, remembered for as long as they must hold: while one is known, nobody asks the store.

A rate that refuses a cost until an instant refuses every greater cost until then too, whoever comes in between: permits
are never given back, so nothing can appear sooner. That makes the memory exact. What it must not be used for: refusals
of slots and circuits, which may end at any moment; a call that comes back with a booking, unless the refusal was one
of a booked call too; a call that wants to book. A changed rule or an adapted limit may admit sooner: `forget` it then.

Forgetting costs one question to the store and never admits anything, so the memory may be bounded as one likes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

MOST: Final = 10_000
"""Limits that are remembered."""
STEPS: Final = 4
"""Costs that are remembered of one limit."""


class Denials:
    """Which costs of which limits are refused for now. For any number of threads; a forked child may go on with it."""

    __slots__ = ("_clock", "_denied", "_most")

    def __init__(self, *, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._denied: dict[str, tuple[tuple[float, float], ...]] = {}  # (cost, until), the smallest cost first
        self._most = most
        self._clock = clock

    def left(self, name: str, cost: float = 1.0) -> float:
        """Seconds for which *cost* of the limit *name* is known to be refused; 0.0: ask; inf: for good."""
        denied = self._denied.get(name)
        if denied is None:
            return 0.0
        now, longest = self._clock(), 0.0
        for least, until in denied:
            if until > now + longest and cost >= least:
                longest = until - now
        return longest

    def keep(self, name: str, cost: float, retry_after: float | None, *, asked_at: float) -> None:
        """The store has refused: for *retry_after* seconds, None for good.

        asked_at: the clock's instant before the store was asked, so that the memory never outlasts the refusal.
        """
        until, now = math.inf if retry_after is None else asked_at + retry_after, self._clock()
        if until <= now:
            return
        steps = [step for step in self._denied.get(name, ()) if step[1] > now and (step[0] < cost or step[1] > until)]
        steps = sorted([*steps, (cost, until)])[:STEPS]
        if name not in self._denied and len(self._denied) >= self._most:
            self._make_room(now)
        self._denied[name] = tuple(steps)

    def forget(self, name: str | None = None) -> None:
        """The limit *name* has changed; None: any may have."""
        if name is None:
            self._denied.clear()
        else:
            self._denied.pop(name, None)

    def __len__(self) -> int:
        return len(self._denied)

    def _make_room(self, now: float) -> None:
        over = [name for name, steps in list(self._denied.items()) if all(until <= now for _, until in steps)]
        for name in over or list(self._denied)[: max(1, self._most // 10)]:
            self._denied.pop(name, None)
