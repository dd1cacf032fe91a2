"""What is asked before a call to a downstream, and what a permit store answers. Values only; see `ports.PermitStore`.

A **line** is what booked slots stand in: a refused call that books is given its own future slot, one interval behind
the slot booked before it. Who comes back with a booking is let in as soon as the rate admits it; who comes without one
waits behind all that have booked. The rate alone decides what is admitted, so a forged or late booking cannot exceed
it, and one that is never used delays nobody longer than its own slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from taskguard.errors import ConfigurationError
from taskguard.policies.circuit import CircuitBreaker, CircuitState
from taskguard.policies.rates import Rate

RefusedBy = Literal["rate", "slot", "circuit"]


@dataclass(frozen=True, slots=True)
class RateAsk:
    """*cost* permits of the limit *name*. ``adaptive``: the limit is what `PermitStore.adapt` keeps under the name."""

    name: str
    policy: Rate
    cost: float = 1.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.cost, bool) or not isinstance(self.cost, (int, float)) or not 0 < self.cost < inf:
            raise ConfigurationError(f"limit {self.name}: a cost of {self.cost!r} is none; give a number above 0")


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the places of the bulkhead *name*, held by *holder* (unique to the call)."""

    name: str
    holder: str


@dataclass(frozen=True, slots=True)
class SlotAsk:
    """One of *limit* places, for *lease* seconds unless it is renewed or released."""

    name: str
    limit: int
    holder: str
    lease: float


@dataclass(frozen=True, slots=True)
class CircuitAsk:
    """Whether the circuit *name* lets a call through; in half-open, a probe is given to *holder*."""

    name: str
    policy: CircuitBreaker
    holder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """All that one call needs, decided together: circuit, then all rates, then the slot; all of it or nothing.

    release: slots given back in the same step, before anything is decided.
    book: where a rate or the slot refuses, take a place in the line. Refusals of a circuit are not booked.
    booked: the call comes back with a booking.
    """

    rates: tuple[RateAsk, ...] = ()
    slot: SlotAsk | None = None
    circuit: CircuitAsk | None = None
    release: tuple[Slot, ...] = ()
    book: bool = False
    booked: bool = False


@dataclass(frozen=True, slots=True)
class RateView:
    """One limit after the answer: permits per period, how many are left now, seconds until all are back."""

    name: str
    limit: float
    remaining: float
    reset_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitView:
    """A circuit as its store has it. ``generation`` grows with each change: what began before it counts no more.

    until: the instant of the next change by itself (open: the first probe; forced: its end), None: none.
    calls, failures, slow: what the window holds. trips: how often it opened since it was last closed.
    closed_at: the instant it last closed, for the slow start; 0.0: never.
    """

    name: str
    state: CircuitState = "closed"
    generation: int = 0
    until: float | None = None
    calls: int = 0
    failures: int = 0
    slow: int = 0
    trips: int = 0
    closed_at: float = 0.0
    who: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Permit:
    """Go. ``probe``: this call is a probe of its circuit; its outcome must be told to `PermitStore.report`."""

    rates: tuple[RateView, ...] = ()
    circuit: CircuitView | None = None
    probe: bool = False
    version: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not now. *retry_after*: seconds until it would be admitted if nobody else came; None: never (the cost is over
    what the limit can admit). *slot_in*: seconds until the booked slot, where one was booked."""

    by: RefusedBy
    name: str
    retry_after: float | None
    slot_in: float | None = None
    rates: tuple[RateView, ...] = ()
    circuit: CircuitView | None = None
    version: int = 0


Answer = Permit | Refusal


@dataclass(slots=True)
class Outcomes:
    """Calls that ended, as one process saw them since it last told the store. All began in *generation*."""

    generation: int = 0
    calls: int = 0
    failures: int = 0
    slow: int = 0


@dataclass(frozen=True, slots=True)
class ProbeOutcome:
    """How a probe ended: "success", "failure", or "ignored" (it gives its place back and says nothing)."""

    holder: str
    outcome: Literal["success", "failure", "ignored"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveView:
    """A limit that adapts: where it stands, and the last changes, newest first: (instant, before, after, why)."""

    name: str
    limit: float
    changes: tuple[tuple[float, float, float, str], ...] = field(default=())
