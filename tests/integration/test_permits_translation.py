"""The Lua scripts decide what the pure functions decide: the same operations through Redis and through memory.

Memory runs the specification itself, so whatever differs here, to the last bit of a wait, is a translation's mistake.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from taskguard.clock import from_us, to_us
from taskguard.permits import Ask, CircuitAsk, Outcomes, ProbeOutcome, RateAsk, Slot, SlotAsk
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.ports import PermitStore
from taskguard.stores import open_permits
from tests.contracts.permits import MicroClock

STEPS = 250
RATES: dict[str, Rate] = {
    "bucket": TokenBucket(7, per=3, burst=4),
    "thin": TokenBucket(0.3, per=1, burst=1.5),
    "leaky": LeakyBucket(3, per=7),
    "fixed": FixedWindow(5, per=0.7),
    "sliding": SlidingWindow(9, per=1.1),
    "log": SlidingLog(6, per=1.3),
}
CIRCUITS = {
    "time": CircuitBreaker(
        minimum_calls=4, window_size=7, wait_in_open=0.9, probes_in_half_open=2, success_threshold=2
    ),
    "count": CircuitBreaker(
        window="count", window_size=23, minimum_calls=5, wait_in_open=0.5, backoff=1.7, max_wait_in_open=2,
        slow_call_duration=1, slow_call_rate_threshold=0.4, failure_rate_threshold=0.6, probe_lease=0.6, slow_start=0,
    ),
}  # fmt: skip
HOLDERS = ("h1", "h 2", "{h}:3", "h4\n")


class Steps:
    """Operations drawn at random, the same for both stores: a step is a function of a store."""

    def __init__(self, seed: int, *, back: bool) -> None:
        self._draw = random.Random(seed)
        self._back = back
        self._generations: dict[str, int] = dict.fromkeys(CIRCUITS, 0)
        self.slots: list[float] = []

    def step(self) -> Callable[[PermitStore], Any]:
        draw = self._draw
        match draw.choices(
            ("admit", "report", "force", "release", "renew", "unbook", "adapt", "look"), (70, 12, 3, 4, 3, 4, 2, 4)
        )[0]:
            case "admit":
                ask = self._ask()
                return lambda store: store.admit(ask)
            case "report":
                name = draw.choice(list(CIRCUITS))
                calls = draw.randrange(8)
                counts = Outcomes(self._generation(name), calls, draw.randint(0, calls), draw.randint(0, calls))
                probe = ProbeOutcome(draw.choice(HOLDERS), draw.choice(("success", "failure", "ignored")))  # type: ignore[arg-type]
                told = draw.choice((None, probe))
                return lambda store: self._noted(store.report(name, CIRCUITS[name], counts, told))
            case "force":
                name, state = draw.choice(list(CIRCUITS)), draw.choice(("forced_open", "forced_closed", "closed"))
                seconds, who = draw.choice((None, 0.8)), draw.choice(("ann", "retry-after"))
                return lambda store: self._noted(
                    store.force(name, state, until=seconds and store.now() + seconds, who=who, why="ä test")
                )
            case "release":
                slots = [Slot("places", draw.choice(HOLDERS)) for _ in range(2)]
                return lambda store: store.release(slots)
            case "renew":
                slots = [Slot("places", draw.choice(HOLDERS)) for _ in range(2)]
                return lambda store: store.renew_slots(slots, lease=0.5)
            case "unbook":
                name, at = draw.choice([*RATES, "places"]), draw.choice(self.slots or [0.0])
                return lambda store: store.unbook(name, at)
            case "adapt":
                name, limit = draw.choice(list(RATES)), draw.uniform(0.5, 20)
                return lambda store: store.adapt(name, limit, why="429 from the bank")
            case _:
                return lambda store: (store.circuits(), store.adaptive("bucket"), store.circuit("time"))

    def _generation(self, name: str) -> int:
        return self._generations[name] - (self._draw.random() < 0.1)

    def _noted(self, view: Any) -> Any:
        self._generations[view.name] = view.generation
        return view

    def _ask(self) -> Ask:
        draw = self._draw
        names = draw.sample(list(RATES), draw.choice((1, 1, 1, 2, 3)))
        rates = [RateAsk(n, RATES[n], draw.choice((1, 1, 1, 2, 0.7, 30)), draw.random() < 0.2) for n in names]
        if draw.random() < 0.05:
            rates.append(rates[0])
        holder, extra = draw.choice(HOLDERS), draw.random()
        return Ask(
            rates=tuple(rates) if extra < 0.8 else (),
            slot=SlotAsk("places", 2, holder, draw.uniform(0.1, 2)) if extra > 0.5 and not self._back else None,
            circuit=CircuitAsk(name := draw.choice(list(CIRCUITS)), CIRCUITS[name], holder) if extra > 0.6 else None,
            release=(Slot("places", draw.choice(HOLDERS)),) if draw.random() < 0.3 else (),
            book=draw.random() < 0.4,
            booked=draw.random() < 0.2,
        )

    def advance(self, clock: MicroClock) -> None:
        """Mostly forward, sometimes by exactly nothing, and where it may, now and then back."""
        draw = self._draw
        clock.advance(us=draw.choice((0, 1, draw.randrange(500_000), draw.randrange(4_000_000))))
        if self._back and draw.random() < 0.1:
            clock.advance(us=-draw.choice((draw.randrange(300_000), draw.randrange(20_000_000))))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_redis_decides_as_the_specification_does(redis_url: str, namespace: str, seed: int, back: bool) -> None:
    """Every answer and every view is the same, through bookings, releases, trips, probes, and clocks that are set back.

    Without slots where clocks are set back: when a place becomes free is an estimate, and may differ then.
    """
    seed = seed or uuid.uuid4().int % 10**6  # one of them is new each time
    clock, steps = MicroClock(), Steps(seed, back=back)
    pure, ours = (open_permits(url, namespace=namespace, clock=clock, timeout=30) for url in ("memory://", redis_url))
    for number in range(STEPS):
        step = steps.step()
        expected, found = step(pure), step(ours)
        assert found == expected, f"seed {seed}, step {number}"
        slot_in = getattr(expected, "slot_in", None)
        if slot_in is not None:
            steps.slots.append(from_us(to_us(clock()) + slot_in * 1e6))
        steps.advance(clock)
    ours.close()
