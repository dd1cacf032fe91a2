"""What one process counts of its calls between two changes of a circuit.

The path of a call that went well takes one step of a count and no lock. What must never happen is that a failure is
told before its call, for nobody would count it, or that it is left behind.
"""

from __future__ import annotations

import threading

from taskguard.downstream.tallies import Tally
from taskguard.permits import Outcomes


class Span:
    """The calls of one process in one generation of a circuit."""

    __slots__ = ("_lock", "_told", "began_at", "calls", "counted", "failures", "generation", "slow")

    def __init__(self, generation: int, *, counted: bool, began_at: float) -> None:
        self.generation = generation
        self.counted = counted
        self.calls, self.failures, self.slow = Tally(), Tally(), Tally()
        self.began_at = began_at
        self._told = (0, 0, 0)
        self._lock = threading.Lock()

    def add(self, *, failed: bool, slow: bool) -> None:
        """Count a call that failed or was slow. The call comes last: see `take`."""
        if failed:
            self.failures.add()
        if slow:
            self.slow.add()
        self.calls.add()

    def take(self) -> Outcomes:
        """What was not told yet; it counts as told. A failure whose call is not counted yet is left for the next."""
        with self._lock:
            before = self._told
            calls = self.calls.total() - before[0]
            failures = min(self.failures.total() - before[1], calls)
            slow = min(self.slow.total() - before[2], calls)
            self._told = (before[0] + calls, before[1] + failures, before[2] + slow)
        return Outcomes(self.generation, calls, failures, slow)

    def successes(self) -> int:
        """How many ended well so far."""
        return self.calls.total() - self.failures.total()

    def put_back(self, outcomes: Outcomes) -> None:
        """It could not be told."""
        with self._lock:
            calls, failures, slow = self._told
            self._told = (calls - outcomes.calls, failures - outcomes.failures, slow - outcomes.slow)
