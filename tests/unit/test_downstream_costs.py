"""What a call costs that nothing stands against: ratios to the bare wrapper, taken in one interleaved run.

The goals are 1.6 (a closed circuit that counts) and 1.15 (a retry that is not needed); a quarter is left for the noise
of a shared machine, and the best of three runs counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from taskguard.policies import CircuitBreaker, Retry
from tests.unit.permithouse import PermitHouse

MARGIN = 1.25


def bare(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What a decorator costs that does nothing but catch."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except Exception:
            raise

    return wrapper


def ratios(subjects: dict[str, Callable[[int], Any]], *, rounds: int = 31, calls: int = 500) -> dict[str, float]:
    """The medians of each subject's time over that of "bare", within the same round."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        took = {}
        for name, call in random.sample(list(subjects.items()), len(subjects)):
            began = time.perf_counter()
            for index in range(calls):
                call(index)
            took[name] = time.perf_counter() - began
        for name in subjects:
            found[name].append(took[name] / took["bare"])
    return {name: median(values) for name, values in found.items()}


def test_what_is_not_needed_costs_next_to_nothing() -> None:
    """P7 and P12."""
    permits = PermitHouse()

    def charge(amount: int) -> int:
        return amount

    subjects = {
        "bare": bare(charge),
        "circuit": permits.downstream("bank", circuit=CircuitBreaker())(charge),
        "retry": permits.downstream("post", retry=Retry())(charge),
    }
    for call in subjects.values():
        call(1)
    runs = [ratios(subjects) for _ in range(3)]
    best = {name: min(run[name] for run in runs) for name in subjects}
    assert best["circuit"] <= 1.6 * MARGIN, runs
    assert best["retry"] <= 1.15 * MARGIN, runs
