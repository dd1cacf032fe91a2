"""What small works take, measured in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

SLICE = 20
"""How often one work is done before it is another's turn: its code and its data are in the caches, as in a loop."""


class Spent(NamedTuple):
    """Seconds: by the clock, and of this thread's CPU."""

    time: float
    cpu: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.time - other.time, self.cpu - other.cpu)


def in_turns(works: Mapping[str, Callable[[int], object]], count: int) -> dict[str, Spent]:
    """The median of each work's, done *count* times."""
    samples: dict[str, list[Spent]] = {name: [] for name in works}
    for begin in range(-SLICE, count, SLICE):
        for name, work in works.items():
            for number in range(begin, begin + SLICE):
                at, cpu = time.perf_counter(), time.thread_time()
                work(number)
                spent = Spent(time.perf_counter() - at, time.thread_time() - cpu)
                if number >= 0:
                    samples[name].append(spent)
    return {
        name: Spent(median(each.time for each in found), median(each.cpu for each in found))
        for name, found in samples.items()
    }
