"""Places for calls under way in this process: a semaphore whose waiters are served in order, threads and tasks alike.

A place that is given back goes to the longest waiter directly, so nobody overtakes and nobody polls. The lock is held
for a few steps only, never across a wait or the call: who does not wait is never refused because it was busy.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from taskguard.downstream.tending import begins_anew

WEIGHT = 0.2
"""Of the newest hold in the average."""
UNKNOWN = 0.05
"""Seconds from one place that becomes free to the next, where no place was given back yet."""
SHORTEST, LONGEST = 0.005, 10.0
"""Seconds for which who is refused is sent away, at least and at most."""


class LocalSlots:
    """*limit* places. Every place that is taken is given back by `release`, once."""

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """The calls under way are the parent's: all places are free in a child."""
        self._lock = threading.Lock()
        self._taken = 0
        self._hold = self._turn = 0.0
        self._waiting: deque[Future[None]] = deque()

    @property
    def active(self) -> int:
        """Places taken."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Callers that wait for one."""
        return len(self._waiting)

    @property
    def available(self) -> int:
        """Places free."""
        return max(0, self.limit - self._taken)

    def take(self) -> bool:
        """Take a place if one is free and nobody waits for it."""
        with self._lock:
            if self._taken >= self.limit or self._waiting:
                return False
            self._taken += 1
            return True

    def ask(self) -> Future[None]:
        """A place, now or later: the future is done when the caller has it. Give up with `withdraw`."""
        place: Future[None] = Future()
        with self._lock:
            if self._taken < self.limit and not self._waiting:
                self._taken += 1
                place.set_result(None)
            else:
                self._waiting.append(place)
        return place

    def withdraw(self, place: Future[None]) -> bool:
        """The caller waits no more. False where it got the place meanwhile: then it has it."""
        with self._lock:
            try:
                self._waiting.remove(place)
            except ValueError:
                return False
            return True

    def turn(self) -> float:
        """Seconds until it is worth coming back for one who got no place: each of those has a turn of its own, by how
        long places are held. Nothing is kept for it."""
        now = self._clock()
        with self._lock:
            spacing = self._hold / self.limit if self._hold else UNKNOWN / self.limit
            self._turn = min(max(self._turn, now) + max(spacing, SHORTEST), now + LONGEST)
            return self._turn - now

    def release(self, held: float | None = None) -> None:
        """Give a place back, that was *held* for so many seconds where that is known."""
        with self._lock:
            if held is not None:
                self._hold += (held - self._hold) * (WEIGHT if self._hold else 1.0)
            if self._waiting:
                place = self._waiting.popleft()
            else:
                self._taken = max(0, self._taken - 1)
                if not self._taken:  # nobody is in the way of those who were sent away
                    self._turn = 0.0
                return
        place.set_result(None)
