"""Permits in a dictionary under one lock. Promises everything the contract asks for, within this process.

The wall clock may be set back or forward: the pure functions mend what lies ahead of it. Cells that say nothing any
more are swept when their number has doubled, so that the store is bounded by what is live, and a live limit is never
forgotten to make room.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from taskguard.clock import Clock, from_us, to_us, wall_clock
from taskguard.limits.admission import Cell, CellKind, Change, State
from taskguard.stores.cells import POLL, CellStore, Work

T = TypeVar("T")

SWEPT_FROM = 1024
"""Cells below which nothing is swept."""


class MemoryPermits(CellStore):
    """A `PermitStore` in process memory. Its clock is the process's unless one is given."""

    in_process: ClassVar = True
    """Nothing is waited for: an event loop may ask it directly."""
    _shared: ClassVar[dict[str, MemoryPermits]] = {}

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or wall_clock
        self._changed = threading.Condition(threading.Lock())
        self._cells: dict[Cell, Change] = {}
        self._sweep_at = SWEPT_FROM

    @classmethod
    def shared(cls, namespace: str, *, clock: Clock | None = None) -> MemoryPermits:
        """The process's permits of this namespace; with a clock of its own, a new store."""
        if clock is not None:
            return cls(clock)
        return cls._shared.setdefault(namespace, cls())

    def __len__(self) -> int:
        return len(self._cells)

    def _run(self, cells: Sequence[Cell], work: Work[T]) -> T:
        with self._changed:
            now = to_us(self._clock())
            found = {cell: self._cells[cell].state for cell in cells if cell in self._cells}
            answer, changes = work(found, now)
            circuits = False
            for cell, change in changes.items():
                if change is None:
                    self._cells.pop(cell, None)
                else:
                    self._cells[cell] = change
                circuits = circuits or cell[0] == "circuit"
            if circuits:
                self._changed.notify_all()
            if len(self._cells) >= self._sweep_at:
                self._sweep(now)
            return answer

    def _all(self, kind: CellKind) -> tuple[dict[str, State], float]:
        with self._changed:
            found = {name: change.state for (each, name), change in self._cells.items() if each == kind}
            return dict(sorted(found.items())), to_us(self._clock())

    def _rest(self) -> None:
        with self._changed:
            self._changed.wait(POLL)

    def _sweep(self, now: float) -> None:
        over = [cell for cell, change in self._cells.items() if change.until is not None and change.until <= now]
        for cell in over:
            del self._cells[cell]
        self._sweep_at = max(SWEPT_FROM, 2 * len(self._cells))

    def now(self) -> float:
        return from_us(to_us(self._clock()))

    def close(self) -> None:
        """Nothing to give back."""
