"""Downstreams on a store in memory whose clock a test moves, that says what it was asked and can be switched off."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from taskguard.downstream.desk import Desk
from taskguard.downstream.service import Downstream
from taskguard.errors import StoreUnavailable
from taskguard.events import Event
from taskguard.permits import CircuitView
from taskguard.stores.memory import MemoryPermits
from tests.clocks import ManualClock

PATIENCE = 10.0
"""Seconds a test waits for what must come."""


class WatchedPermits(MemoryPermits):
    """The store in memory; ``asked`` counts its operations, and ``down`` makes it fail as one that is away."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.asked: Counter[str] = Counter()
        self.down = False
        self.silent = False
        """Whether nobody hears of changes any more."""

    def _step(self, name: str) -> None:
        self.asked[name] += 1
        if self.down:
            raise StoreUnavailable("no answer within 0.1 s")

    def admit(self, ask: Any) -> Any:
        self._step("admit")
        return super().admit(ask)

    def release(self, slots: Sequence[Any]) -> None:
        self._step("release")
        super().release(slots)

    def renew_slots(self, slots: Sequence[Any], *, lease: float) -> list[bool]:
        self._step("renew_slots")
        return super().renew_slots(slots, lease=lease)

    def report(self, *args: Any, **options: Any) -> Any:
        self._step("report")
        return super().report(*args, **options)

    def circuit(self, name: str) -> CircuitView:
        self._step("circuit")
        return super().circuit(name)

    def force(self, *args: Any, **options: Any) -> Any:
        self._step("force")
        return super().force(*args, **options)

    def watch_circuits(self, changed: Callable[[CircuitView], None], *, stop: Callable[[], bool]) -> None:
        super().watch_circuits(lambda view: None if self.silent else changed(view), stop=stop)


class PermitHouse:
    """One store, and the desks of any number of processes at it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = WatchedPermits(self.clock)
        self.events: list[Event] = []
        self.desk = self.another_desk()

    def another_desk(self) -> Desk:
        """The desk of another process."""
        return Desk(self.store, notify=self.events.append, clock=self.clock)

    def downstream(self, name: str = "bank", *, desk: Desk | None = None, **options: Any) -> Downstream:
        """A downstream at this store."""
        return Downstream(name, store=desk or self.desk, **options)

    def told(self, name: str) -> list[Event]:
        """The events of this name so far."""
        return [event for event in self.events if event.name == name]


def threads(many: int, work: Callable[[int], Any]) -> list[Any]:
    """What *work* gives or raises in so many threads that begin together."""
    found: list[Any] = [None] * many
    gate = threading.Barrier(many)

    def run(index: int) -> None:
        gate.wait(PATIENCE)
        try:
            found[index] = work(index)
        except BaseException as exc:
            found[index] = exc

    workers = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(many)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "a thread has not come back"
    return found
