"""Interleaved measurement: each round runs a slice of every subject in shuffled order.

A busy machine slows a whole round, so what is compared is the ratio within a round; its median over the rounds is what
a promise is read from. Absolute figures are good for nothing here.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import thread_time

Subject = Callable[[], object]
Clock = Callable[[], float]


def cpu_of_both(pid: int) -> Clock:
    """CPU seconds of this thread and of the main thread of the server with this process id, which is this bench's own.

    For a machine so busy that wall time measures its neighbours. It leaves out the wake-ups that a round trip costs.
    """
    path = Path(f"/proc/{pid}/task/{pid}/schedstat")
    return lambda: thread_time() + int(path.read_text().split()[0]) / 1e9


class Slices:
    """Seconds an operation of each subject took, round by round."""

    def __init__(self, rounds: Mapping[str, list[float]]) -> None:
        self._rounds = rounds

    def ratio(self, subject: str, to: str) -> float:
        """Median over the rounds of how many times *to*'s time *subject* took."""
        return median(a / b for a, b in zip(self._rounds[subject], self._rounds[to], strict=True))

    def median(self, subject: str) -> float:
        """Seconds of one operation."""
        return median(self._rounds[subject])


def measure(
    subjects: Mapping[str, Subject], *, rounds: int, slice_seconds: float = 0.005, clock: Clock = thread_time
) -> Slices:
    """Run all *subjects* for *rounds* slices of about *slice_seconds* each: short, so that most are not interrupted.

    clock: CPU time, whatever else runs on the machine, is for subjects that wait for nobody; `perf_counter` for others.
    """
    loops = {name: _loops(subject, slice_seconds, clock) for name, subject in subjects.items()}
    found: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            random.shuffle(order)
            for name in order:
                found[name].append(_slice(subjects[name], loops[name], clock))
    finally:
        if collecting:
            gc.enable()
    return Slices(found)


def _slice(subject: Subject, loops: int, clock: Clock) -> float:
    turns = range(loops)
    began = clock()
    for _ in turns:
        subject()
    return (clock() - began) / loops


def _loops(subject: Subject, seconds: float, clock: Clock) -> int:
    subject()
    loops = 1
    while (took := _slice(subject, loops, clock) * loops) < seconds / 4:
        loops *= 2
    return max(1, round(loops * seconds / took))
