"""What the contract tests ask of a permit store, and a clock to ask it by."""

from __future__ import annotations

from taskguard.permits import (
    Answer,
    Ask,
    CircuitAsk,
    Outcomes,
    Permit,
    ProbeOutcome,
    RateAsk,
    Refusal,
    Slot,
    SlotAsk,
)
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.ports import PermitStore

START = 1_750_000_000
"""Epoch seconds at which the clock starts: an edge of all windows of 1, 10 and 1000 seconds."""
EVERY_RATE: tuple[Rate, ...] = (
    TokenBucket(3, per=10),
    LeakyBucket(3, per=10),
    FixedWindow(3, per=10),
    SlidingWindow(3, per=10),
    SlidingLog(3, per=10),
)
"""Each algorithm, three permits in ten seconds."""


def kind(policy: object) -> str:
    """How a test's id names a policy."""
    return type(policy).__name__


class MicroClock:
    """Epoch seconds that stand still until `advance`, counted in whole microseconds so that no fraction is lost."""

    def __init__(self) -> None:
        self.passed = 0

    def __call__(self) -> float:
        return START + self.passed / 1e6

    def advance(self, seconds: float = 0.0, *, us: int = 0) -> None:
        """Move on (or back)."""
        self.passed += round(seconds * 1e6) + us


def take(
    permits: PermitStore, policy: Rate, cost: float = 1, *, name: str = "bank", book: bool = False, booked: bool = False
) -> Answer:
    """Ask for one call."""
    return permits.admit(Ask(rates=(RateAsk(name, policy, cost),), book=book, booked=booked))


def admitted(answer: Answer) -> bool:
    """Whether the call may go."""
    return isinstance(answer, Permit)


def wait_us(answer: Answer) -> int:
    """The told wait of a refusal, in microseconds."""
    assert isinstance(answer, Refusal), answer
    assert answer.retry_after is not None
    return round(answer.retry_after * 1e6)


def slot_in(answer: Answer) -> float:
    """Seconds until the slot that a refused call has booked."""
    assert isinstance(answer, Refusal), answer
    assert answer.slot_in is not None
    return answer.slot_in


def at_once(permits: PermitStore, policy: Rate, *, most: int = 50) -> int:
    """How many calls go now, one after another."""
    for count in range(most):
        if not admitted(take(permits, policy)):
            return count
    return most


def place(permits: PermitStore, holder: str, *, limit: int = 1, lease: float = 10.0, book: bool = False) -> Answer:
    """Ask for a place of the bulkhead."""
    return permits.admit(Ask(slot=SlotAsk("bank", limit, holder, lease), book=book))


def slot(holder: str) -> Slot:
    """The place of this holder."""
    return Slot("bank", holder)


def through(permits: PermitStore, policy: CircuitBreaker, holder: str = "caller") -> Answer:
    """Ask the circuit for one call."""
    return permits.admit(Ask(circuit=CircuitAsk("bank", policy, holder)))


def tell(
    permits: PermitStore, policy: CircuitBreaker, *, calls: int, failures: int = 0, slow: int = 0, generation: int = 0
) -> str:
    """Report calls. Returns the state the circuit is in then."""
    return permits.report("bank", policy, Outcomes(generation, calls, failures, slow)).state


def probed(permits: PermitStore, policy: CircuitBreaker, holder: str, outcome: str, *, generation: int) -> str:
    """Report a probe. Returns the state the circuit is in then."""
    probe = ProbeOutcome(holder, outcome)  # type: ignore[arg-type]
    return permits.report("bank", policy, Outcomes(generation), probe).state
