"""Counters that no thread waits for and no thread loses: a call costs one step of an `itertools.count`.

``n += 1`` loses counts between threads and a lock costs three times as much. A step of a count is one C call that the
interpreter does not interrupt; without a global lock it is one that CPython makes atomic. Reading takes a step too,
which is subtracted.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from itertools import count

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: the upper edges of the durations' histogram, those of the Prometheus clients."""


class Tally:
    """Counts. ``add()`` is for any number of threads."""

    __slots__ = ("_count", "_lock", "_reads", "add")

    def __init__(self) -> None:
        self._count = count()
        self._lock = threading.Lock()
        self._reads = 0
        self.add = self._count.__next__

    def total(self) -> int:
        """How often it was added to."""
        with self._lock:
            total = next(self._count) - self._reads
            self._reads += 1
            return total


class Durations:
    """A histogram of seconds, with its sum."""

    __slots__ = ("_buckets", "_lock", "_sum")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One took so long."""
        index = bisect_left(BOUNDS, seconds)
        with self._lock:
            self._buckets[index] += 1
            self._sum += seconds

    def read(self) -> tuple[int, float, tuple[tuple[float, int], ...]]:
        """How many, their sum, and (upper edge, how many up to it) as Prometheus keeps them."""
        with self._lock:
            counts, total = list(self._buckets), self._sum
        running, edges = 0, []
        for edge, many in zip((*BOUNDS, float("inf")), counts, strict=True):
            running += many
            edges.append((edge, running))
        return running, total, tuple(edges)
