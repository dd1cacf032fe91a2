"""What a limiter decides: the decision, how each limit stands, the error it becomes, and a call's turn in line."""

from __future__ import annotations

import time
from dataclasses import dataclass

from taskguard.downstream.admittance import booked_for, booking
from taskguard.errors import RateLimitedError
from taskguard.permits import RateView
from taskguard.policies.rates import Rate
from taskguard.rules import Identity, Rule

LATE = 0.25
"""Seconds for which a run that came back for its slot waits for it where it is: resting again would take longer."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How one limit stands after the decision."""

    rule: Rule
    rate: Rate
    view: RateView


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a call may go on.

    refused_by: the rule that refused, None where none did, also where the store is down. retry_after: seconds; None:
    its cost is over what the limit can ever admit. slot_in: seconds until the booked slot, where one was booked;
    slot_at: its instant, by the store's clock.
    crowded: refused because too many calls of this process wait for the store already, whatever it would say.
    """

    allowed: bool
    identity: Identity
    standings: tuple[Standing, ...] = ()
    refused_by: Rule | None = None
    limit: str = ""
    retry_after: float | None = 0.0
    slot_in: float | None = None
    slot_at: float | None = None
    store_down: bool = False
    crowded: bool = False
    version: int = 0


def refusal(decision: Decision, name: str) -> RateLimitedError:
    """The error that says what the decision does. A new one each time."""
    wait = decision.retry_after
    if decision.store_down:
        why = "the permit store does not answer, and on_store_down is 'refuse'"
    elif decision.crowded:
        why = f"too many calls of this process wait for the permit store; come again in {wait:.3g} s"
    elif wait is None:
        why = "it costs more than its limit can ever admit; lower the cost or raise the limit"
    else:
        why = f"its limit is used up; come again in {wait:.3g} s"
    who = f" for {decision.identity.client}" if decision.identity.client else ""
    return RateLimitedError(
        f"{name}{who}: {why}", retry_after=wait, slot_at=decision.slot_at, downstream=name, limit=decision.limit
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """How one call stands in line: whether it books, came for a booking, comes back for one, and waits until when."""

    name: str
    books: bool
    booked: bool
    comes_back: bool
    until: float

    @classmethod
    def begin(cls, name: str, max_wait: float) -> Turn:
        comes_back = bool(name) and booking.get()
        booked = bool(name) and name in booked_for.get()
        patience = max(max_wait, LATE) if booked else max_wait
        return cls(name, max_wait > 0 or comes_back, booked, comes_back, time.monotonic() + patience)

    def end(self, decision: Decision) -> None:
        """A booking is used up by the first call that it lets in."""
        if self.booked and decision.allowed:
            booked_for.set(booked_for.get() - {self.name})
