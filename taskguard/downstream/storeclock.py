"""A store's clock, as a process knows it: what is told to a store is told by the store's own time."""

from __future__ import annotations

from collections.abc import Callable

from taskguard.clock import wall_clock
from taskguard.errors import StoreError

KEPT = 10.0
"""Seconds for which the difference between the store's clock and this process's is believed."""


class StoreClock:
    """The store's instants (*ask*), by this process's *clock* and a difference that is measured now and then."""

    __slots__ = ("_ask", "_clock", "_offset")

    def __init__(self, ask: Callable[[], float], clock: Callable[[], float]) -> None:
        self._ask, self._clock = ask, clock
        self._offset: tuple[float, float] | None = None

    def now(self) -> float:
        """Epoch seconds. One round trip at most; where the store does not answer, by what was measured last, or the
        process's own wall clock."""
        at = self._clock()
        offset = self._offset
        if offset is None or at - offset[1] > KEPT:
            try:
                offset = self._offset = (self._ask() - at, at)
            except StoreError:
                return wall_clock() if offset is None else at + offset[0]
        return at + offset[0]
