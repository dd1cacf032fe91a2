"""How a call is refused: the error that says what refused, and when to come back; or, for a shadow, what it would say.

Each refusal is an exception of its own: one that is raised twice gathers the tracebacks of all who met it.
"""

from __future__ import annotations

from collections.abc import Callable

from taskguard.downstream.circuit import Circuit
from taskguard.downstream.desk import Desk
from taskguard.downstream.tallies import Durations, Tally
from taskguard.errors import BulkheadFullError, CircuitOpenError, RateLimitedError, Refused
from taskguard.events import Event
from taskguard.limits.breaker import PAUSED
from taskguard.permits import Ask, Refusal

ASKED_TO_WAIT = PAUSED
"""Who paused a downstream that asked for it itself."""
PROBING = 1.0
"""Seconds after which to come back to a circuit whose probes are under way: they will have ended, as a rule."""
BY_HAND = "it stays so until an operator closes it"
"""When to come back to a circuit that was opened for good: a task waits for it, a call need not."""


class Tallies:
    """What this process counts of one downstream."""

    def __init__(self) -> None:
        self.asked, self.rate_refused, self.slot_refused, self.slots_lost = Tally(), Tally(), Tally(), Tally()
        self.retries, self.exhausted, self.timeouts, self.fallbacks = Tally(), Tally(), Tally(), Tally()
        self.store_down, self.shadowed = Tally(), Tally()
        self.held, self.given_back = Tally(), Tally()
        self.durations = Durations()


class Refuser:
    """Refuses the calls to one downstream; a *shadow* only tells."""

    def __init__(self, name: str, *, tallies: Tallies, shadow: bool, desk: Callable[[], Desk]) -> None:
        self.name, self.shadow = name, shadow
        self._tallies, self._desk = tallies, desk

    def _refuse(self, by: str, error: Refused) -> None:
        desk = self._desk()
        if self.shadow:
            self._tallies.shadowed.add()
            desk.notify(Event(name="would_refuse", key=self.name, detail=str(error)))
            return
        desk.notify(Event(name=by, key=self.name, detail=str(error)))
        raise error

    def by_place(self, places: int, retry_after: float) -> None:
        """All places of this process are taken."""
        self._tallies.slot_refused.add()
        self._refuse(
            "slot_refused",
            BulkheadFullError(
                f"{self.name}: all {places} places of this process are taken; call later, or raise the limit",
                retry_after=retry_after,
                downstream=self.name,
                limit=self.name,
            ),
        )

    def by_store(self, refusal: Refusal, ask: Ask, *, slot_at: float | None) -> None:
        """The store refused a rate or a place. *slot_at*: the slot that was booked for the caller, who keeps it."""
        kind: type[Refused]
        if refusal.by == "rate":
            self._tallies.rate_refused.add()
            by, kind = "rate_refused", RateLimitedError
            what = self._used_up(refusal, ask)
        else:
            self._tallies.slot_refused.add()
            by, kind = "slot_refused", BulkheadFullError
            what = f"all {0 if ask.slot is None else ask.slot.limit} places of the fleet are taken"
        self._refuse(
            by,
            kind(
                f"{self.name}: {what}; {_when(refusal.retry_after)}",
                retry_after=refusal.retry_after,
                slot_at=slot_at,
                downstream=self.name,
                limit=refusal.name,
            ),
        )

    def by_circuit(self, circuit: Circuit, retry_after: float | None) -> None:
        """The circuit lets nothing through, or the downstream asked to be left alone."""
        view = circuit.view
        if view.state == "half_open" and retry_after is not None:  # the store tells how long a probe may take at most
            retry_after = min(retry_after, PROBING)
        kind: type[Refused]
        if view.who == ASKED_TO_WAIT:
            self._tallies.rate_refused.add()
            by, kind = "rate_refused", RateLimitedError
            what = f"the downstream asked to be left alone ({view.why})"
        else:
            circuit.rejected.add()
            by, kind = "circuit_refused", CircuitOpenError
            why = f": {view.why}" if view.why else ""
            said = f" by {view.who}{why}" if view.state == "forced_open" else ""
            what = f"its circuit is {view.state.replace('_', ' ')}{said}"
        by_hand = retry_after is None and view.state == "forced_open"
        self._refuse(
            by,
            kind(
                f"{self.name}: {what}; {BY_HAND if by_hand else _when(retry_after)}",
                retry_after=retry_after,
                downstream=self.name,
                limit=circuit.name,
            ),
        )

    def by_outage(self, why: str, retry_after: float) -> None:
        """The store does not answer, and calls are to be refused then."""
        self._refuse(
            "store_refused",
            Refused(
                f"{self.name}: the permit store does not answer ({why}) and on_store_down is 'refuse'; "
                f"{_when(retry_after)}",
                retry_after=retry_after,
                downstream=self.name,
                limit=self.name,
            ),
        )

    @staticmethod
    def _used_up(refusal: Refusal, ask: Ask) -> str:
        for rate in ask.rates:
            if rate.name == refusal.name:
                most = rate.policy.most
                if rate.cost > most:
                    return f"a call of cost {rate.cost:g} is over the {most:g} that limit {rate.name!r} ever admits"
                return f"limit {rate.name!r} ({rate.policy.limit:g} per {rate.policy.period:g} s) is used up"
        return f"limit {refusal.name!r} is used up"


def _when(retry_after: float | None) -> str:
    if retry_after is None:
        return "waiting will not help"
    return f"try again in {retry_after:.3g} s"
