"""Demand in process memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from taskguard.clock import Clock, wall_clock
from taskguard.traffic import KEPT, MOST, OTHER, WINDOW, Asked, Counted

Key = tuple[str, str, str]


class MemoryDemand:
    """A `DemandStore` in process memory. Its clock is the process's unless one is given."""

    _shared: ClassVar[dict[str, MemoryDemand]] = {}

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or wall_clock
        self._lock = threading.Lock()
        self._windows: dict[float, dict[Key, tuple[float, float]]] = {}

    @classmethod
    def shared(cls, namespace: str, *, clock: Clock | None = None) -> MemoryDemand:
        """The process's demand of this namespace; with a clock of its own, a new store."""
        if clock is not None:
            return cls(clock)
        return cls._shared.setdefault(namespace, cls())

    def add(self, asked: Sequence[Asked]) -> list[Counted]:
        with self._lock:
            now = self._clock()
            at = now - now % WINDOW
            for old in [each for each in self._windows if each <= now - KEPT]:
                del self._windows[old]
            window = self._windows.setdefault(at, {})
            sums = {}
            for each in asked:
                key: Key = (each.client, each.endpoint, each.rule)
                own = key in window or len(window) < MOST
                key = key if own else (OTHER, OTHER, OTHER)
                accepted, refused = window.get(key, (0.0, 0.0))
                window[key] = (accepted + each.accepted, refused + each.refused)
                if own:
                    sums[key] = _counted(at, key, window[key])
            return list(sums.values())

    def read(self, *, since: float) -> list[Counted]:
        with self._lock:
            return [
                _counted(at, key, sums)
                for at, window in sorted(self._windows.items())
                if at + WINDOW > since
                for key, sums in window.items()
            ]

    def now(self) -> float:
        return self._clock()

    def close(self) -> None:
        """Nothing to give back."""


def _counted(at: float, key: Key, sums: tuple[float, float]) -> Counted:
    client, endpoint, rule = key
    return Counted(window_at=at, client=client, endpoint=endpoint, rule=rule, accepted=sums[0], refused=sums[1])
