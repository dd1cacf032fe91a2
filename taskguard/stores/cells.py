"""Permits over cells: what every store that can change a few states under a lock has in common.

A backend says how cells are loaded, locked and written; what is made of them is decided by pure functions, the same in
memory and in SQL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from taskguard.clock import from_us, span_us, to_us
from taskguard.errors import ConfigurationError
from taskguard.limits import admission, breaker, bulkheads, line
from taskguard.limits.admission import Cell, CellKind, Cells, Change, State
from taskguard.limits.breaker import Circuit
from taskguard.permits import AdaptiveView, Answer, Ask, CircuitView, Outcomes, ProbeOutcome, Slot
from taskguard.policies.checks import number
from taskguard.policies.circuit import CircuitBreaker, CircuitState

T = TypeVar("T")
Changes = Mapping[Cell, Change | None]
"""What to keep of each cell; None: forget it."""
Work = Callable[[Cells, float], tuple[T, Changes]]
"""What is decided from the cells and the store's instant. It may be asked again."""

POLL = 0.05
"""Seconds between two looks at the circuits, where nothing is pushed."""
CHANGES_KEPT = 20
ADAPTED_FOR = 30 * 86400e6
"""Microseconds for which an adaptive limit outlives its last change."""
FORCED: tuple[CircuitState, ...] = ("forced_open", "forced_closed", "disabled", "closed")


class CellStore(ABC):
    """The operations of a `PermitStore`, each one `_run`."""

    version = 0
    """Of the rules, told with every answer."""

    @abstractmethod
    def _run(self, cells: Sequence[Cell], work: Work[T]) -> T:
        """Load and lock the cells, in their order; decide; write what has changed. All in one step."""

    @abstractmethod
    def _all(self, kind: CellKind) -> tuple[dict[str, State], float]:
        """The cells of a kind by name, sorted, and the store's instant."""

    @abstractmethod
    def _rest(self) -> None:
        """Wait for a change of a circuit, `POLL` seconds at most."""

    # -- calls --------------------------------------------------------------------------------------------------------

    def admit(self, ask: Ask) -> Answer:
        return self._run(
            admission.cells_of(ask), lambda cells, now: admission.admit(ask, cells, now, version=self.version)
        )

    def release(self, slots: Sequence[Slot]) -> None:
        wanted = tuple(slots)
        self._run(_slots(wanted), lambda cells, now: (None, admission.release(wanted, cells, now)))

    def renew_slots(self, slots: Sequence[Slot], *, lease: float) -> list[bool]:
        wanted = tuple(slots)

        def work(cells: Cells, now: float) -> tuple[list[bool], Changes]:
            states, renewed = dict(cells), []
            changes: dict[Cell, Change | None] = {}
            for slot in wanted:
                cell: Cell = ("slots", slot.name)
                state = bulkheads.renew(states.get(cell), now, holder=slot.holder, lease=span_us(lease))
                renewed.append(state is not None)
                if state is not None:
                    states[cell], changes[cell] = state, Change(state, bulkheads.until(state, now))
            return renewed, changes

        return self._run(_slots(wanted), work)

    def unbook(self, name: str, slot_at: float) -> None:
        both: list[Cell] = [("line", name), ("queue", name)]

        def work(cells: Cells, now: float) -> tuple[None, Changes]:
            states = {cell: line.unbook(cells.get(cell), now, to_us(slot_at)) for cell in both}
            return None, {cell: Change(state, line.until(state)) for cell, state in states.items() if state is not None}

        self._run(both, work)

    # -- circuits -----------------------------------------------------------------------------------------------------

    def report(
        self, name: str, policy: CircuitBreaker, outcomes: Outcomes, probe: ProbeOutcome | None = None
    ) -> CircuitView:
        terms = breaker.terms_of(policy)
        return self._circuit(name, lambda circuit, now: breaker.report(terms, circuit, now, outcomes, probe))

    def force(self, name: str, state: CircuitState, *, until: float | None, who: str, why: str) -> CircuitView:
        if state not in FORCED:
            raise ConfigurationError(f"circuit {name}: {state!r} is no state to force; use one of {', '.join(FORCED)}")
        end = 0.0 if until is None or state == "closed" else to_us(until)
        return self._circuit(name, lambda circuit, now: breaker.force(circuit, now, state, until=end, who=who, why=why))

    def circuit(self, name: str) -> CircuitView:
        return self._circuit(name, breaker.current)

    def circuits(self) -> list[CircuitView]:
        states, now = self._all("circuit")
        return [breaker.view(name, Circuit(*state), now) for name, state in states.items()]

    def watch_circuits(self, changed: Callable[[CircuitView], None], *, stop: Callable[[], bool]) -> None:
        seen: dict[str, int] = {}
        while not stop():
            for view in self.circuits():
                if seen.get(view.name, 0) != view.generation:
                    seen[view.name] = view.generation
                    changed(view)
            self._rest()

    def watch_paused(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        return  # it cannot push

    def _circuit(self, name: str, step: Callable[[Circuit, float], Circuit]) -> CircuitView:
        cell: Cell = ("circuit", name)

        def work(cells: Cells, now: float) -> tuple[CircuitView, Changes]:
            before = Circuit(*(cells.get(cell) or ()))
            after = step(before, now)
            changes: Changes = {} if after == before else {cell: Change(after, breaker.until(after, now))}
            return breaker.view(name, after, now), changes

        return self._run([cell], work)

    # -- adaptive limits and paused queues ----------------------------------------------------------------------------

    def adapt(self, name: str, limit: float, *, why: str) -> AdaptiveView:
        cell: Cell = ("adaptive", name)
        if not number(f"limit {name}", limit, least=0.0):
            raise ConfigurationError(f"limit {name}: 0 admits nothing; force the circuit open to stop calls")

        def work(cells: Cells, now: float) -> tuple[AdaptiveView, Changes]:
            before, changes = cells.get(cell) or (limit, ())
            after = (float(limit), ((now, float(before), float(limit), why), *changes)[:CHANGES_KEPT])
            return _adaptive(name, after), {cell: Change(after, now + ADAPTED_FOR)}

        return self._run([cell], work)

    def adaptive(self, name: str) -> AdaptiveView | None:
        cell: Cell = ("adaptive", name)

        def work(cells: Cells, now: float) -> tuple[AdaptiveView | None, Changes]:
            state = cells.get(cell)
            return (None if state is None else _adaptive(name, state)), {}

        return self._run([cell], work)

    def pause(self, queue: str, *, until: float | None, who: str, why: str) -> None:
        end = None if until is None else to_us(until)
        cell: Cell = ("pause", queue)
        self._run([cell], lambda cells, now: (None, {cell: Change((end, who, why), end)}))

    def resume(self, queue: str) -> bool:
        cell: Cell = ("pause", queue)

        def work(cells: Cells, now: float) -> tuple[bool, Changes]:
            state = cells.get(cell)
            return (state is not None and _lasts(state, now)), {cell: None}

        return self._run([cell], work)

    def paused(self) -> Mapping[str, tuple[float | None, str, str]]:
        states, now = self._all("pause")
        return {
            queue: (None if end is None else from_us(end), who, why)
            for queue, (end, who, why) in states.items()
            if _lasts((end, who, why), now)
        }


def _slots(slots: Sequence[Slot]) -> list[Cell]:
    cells: set[Cell] = {("slots", slot.name) for slot in slots}
    return sorted(cells)


def _lasts(pause: State, now: float) -> bool:
    return pause[0] is None or bool(pause[0] > now)


def _adaptive(name: str, state: State) -> AdaptiveView:
    changes = tuple((from_us(at), float(before), float(after), str(why)) for at, before, after, why in state[1])
    return AdaptiveView(name=name, limit=float(state[0]), changes=changes)
