"""Random lives of limits, places and circuits: every store gives the very answers of the pure functions.

`MemoryPermits` is the pure functions over a dictionary; each other backend lives through the same sequence beside it.
What the functions themselves promise is in ``tests/unit/test_limits.py`` and in the other contract tests.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from taskguard.permits import Ask, CircuitAsk, Outcomes, ProbeOutcome, RateAsk, Refusal, Slot, SlotAsk
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import FixedWindow, LeakyBucket, SlidingLog, SlidingWindow, TokenBucket
from taskguard.ports import PermitStore
from taskguard.stores import open_permits
from taskguard.stores.memory import MemoryPermits
from tests.contracts.permits import MicroClock

RATES = [
    TokenBucket(7, per=3),
    TokenBucket(100, per=1, burst=3),
    TokenBucket(1, per=366 * 86400, burst=2.5),
    LeakyBucket(3.3, per=0.7),
    FixedWindow(3, per=0.9),
    SlidingWindow(7, per=1.1),
    SlidingWindow(3, per=10),
    SlidingLog(4, per=2),
]
BREAKERS = [
    CircuitBreaker(minimum_calls=1000, window_size=3),
    CircuitBreaker(minimum_calls=3, wait_in_open=2, backoff=1.7, max_wait_in_open=9, window_size=7, probe_lease=1.5),
    CircuitBreaker(
        minimum_calls=2,
        window="count",
        window_size=5,
        wait_in_open=1,
        slow_call_rate_threshold=0.6,
        slow_call_duration=1,
        probes_in_half_open=2,
        success_threshold=2,
    ),
]
NAMES = ["a", "b{c}:d"]
HOLDERS = ["h1", "h 2", "h:3", "h4"]
COSTS = [1, 1, 1, 2, 0.1, 1.7, 3, 50]
STEPS = 60


class Life:
    """Two stores, one clock, and a dice. A life has few names and policies, so that what it does meets."""

    def __init__(self, store: PermitStore, clock: MicroClock, seed: int) -> None:
        self.clock, self.store, self.model = clock, store, MemoryPermits(clock)
        self.dice = random.Random(seed)
        self.names = self._some(NAMES, 2)
        self.rates = self._some(RATES, 3)
        self.breakers = self._some(BREAKERS, 3)
        self.adaptive = self.dice.random() < 0.3
        self.told: list[int] = []
        self.probes: list[tuple[str, str]] = []
        # A lease that was over may be forgotten or not: where time goes back, that would tell stores apart.
        self.time_goes_back = self.dice.random() < 0.3
        places = {Life.calls_need_places, Life.holders_speak} if self.time_goes_back else {Life.the_clock_is_set_back}
        every = [plot for plot in self.PLOTS if plot not in places]
        self.plots = [*self._some(every, len(every)), Life.time_passes, Life.somebody_waits_as_told]

    def _some(self, choices: list[Any], most: int) -> list[Any]:
        return self.dice.sample(choices, self.dice.randint(1, most))

    def _same(self, what: str, ask: Callable[[PermitStore], Any]) -> Any:
        expected, answer = ask(self.model), ask(self.store)
        note(f"{self.clock.passed:>16} {what} -> {expected}")
        assert answer == expected
        return answer

    def step(self) -> None:
        """Something happens."""
        self.dice.choice(self.plots)(self)

    def time_passes(self) -> None:
        self.clock.advance(
            us=self.dice.choice([1, 1000, 333_333, 900_000, 10**6, 10**7, self.dice.randrange(2 * 10**6)])
        )

    def somebody_waits_as_told(self) -> None:
        if self.told:
            self.clock.advance(us=max(self.dice.choice(self.told[-4:]) - self.dice.randrange(2), 0))

    def the_clock_is_set_back(self) -> None:
        self.clock.advance(self.dice.choice([-0.001, -0.3, -1, -1.000001, -1.2, -2, -3600]))

    def calls_are_rated(self) -> None:
        self._call(rates=self._rates(self.dice.randint(1, 2)))

    def calls_need_places(self) -> None:
        self._call(slot=self._place())

    def calls_go_through_the_circuit(self) -> None:
        self._call(circuit=self._circuit())

    def calls_need_everything(self) -> None:
        dice = self.dice
        self._call(
            rates=self._rates(dice.randrange(4)),
            slot=self._place() if dice.random() < 0.7 and not self.time_goes_back else None,
            circuit=self._circuit() if dice.random() < 0.7 else None,
            release=tuple(self._slots(2)),
        )

    def _call(self, **parts: Any) -> None:
        ask = Ask(book=self.dice.random() < 0.5, booked=self.dice.random() < 0.3, **parts)
        for _ in range(self.dice.randint(1, 5)):
            answer = self._same(str(ask), lambda store: store.admit(ask))
            if isinstance(answer, Refusal):
                waits = [wait for wait in (answer.retry_after, answer.slot_in) if wait is not None]
                self.told += [round(wait * 1e6) for wait in waits]
            elif answer.probe and ask.circuit is not None:
                self.probes.append((ask.circuit.name, ask.circuit.holder))

    def _rates(self, count: int) -> tuple[RateAsk, ...]:
        dice = self.dice
        return tuple(
            RateAsk(dice.choice(self.names), dice.choice(self.rates), dice.choice(COSTS), self.adaptive)
            for _ in range(count)
        )

    def _place(self) -> SlotAsk:
        dice = self.dice
        return SlotAsk(dice.choice(self.names), dice.randint(1, 3), dice.choice(HOLDERS), dice.choice([0.5, 3.0, 10.0]))

    def _circuit(self) -> CircuitAsk:
        return CircuitAsk(self.dice.choice(self.names), self.dice.choice(self.breakers), self.dice.choice(HOLDERS))

    def _slots(self, most: int) -> list[Slot]:
        return [
            Slot(self.dice.choice(self.names), self.dice.choice(HOLDERS)) for _ in range(self.dice.randint(0, most))
        ]

    def holders_speak(self) -> None:
        slots, lease = self._slots(3), self.dice.choice([0.5, 3.0, 20.0])
        if self.dice.random() < 0.3:
            self._same(f"renew {slots} {lease}", lambda store: store.renew_slots(slots, lease=lease))
        else:
            self._same(f"release {slots}", lambda store: store.release(slots))

    def a_booking_is_given_back(self) -> None:
        if self.told:
            name = self.dice.choice(self.names)
            at = self.clock() + self.dice.choice(self.told[-9:]) / 1e6 + self.dice.choice([0.0, 0.0, 0.5])
            self._same(f"unbook {name} {at}", lambda store: store.unbook(name, at))

    def outcomes_are_reported(self) -> None:
        dice, name, breaker, probe = self.dice, self.dice.choice(self.names), self.dice.choice(self.breakers), None
        if self.probes and dice.random() < 0.6:
            name, holder = dice.choice(self.probes[-3:])
            probe = ProbeOutcome(holder, dice.choice(["success", "success", "failure", "ignored"]))
        calls = dice.randrange(5)
        generation = self.model.circuit(name).generation - (dice.random() < 0.1)
        outcomes = Outcomes(generation, calls, dice.randint(0, calls), dice.randint(0, calls))
        self._same(f"report {name} {outcomes} {probe}", lambda store: store.report(name, breaker, outcomes, probe))

    def an_operator_forces(self) -> None:
        name, state = self.dice.choice(self.names), self.dice.choice(breaker_states)
        seconds = self.dice.choice([None, 0.5, 2.0, -1.0])
        until, who = None if seconds is None else self.clock() + seconds, self.dice.choice(["eve", "retry-after"])
        self._same(
            f"force {name} {state} {seconds} {who}",
            lambda store: store.force(name, state, until=until, who=who, why="ä\n"),
        )

    def a_limit_adapts(self) -> None:
        name, limit = self.dice.choice(self.names), self.dice.choice([0.3, 1, 7, 1000.5])
        self._same(f"adapt {name} {limit}", lambda store: store.adapt(name, limit, why="because"))

    def a_queue_is_paused(self) -> None:
        queue, seconds = self.dice.choice(self.names), self.dice.choice([None, 0.5, 30.0])
        until = None if seconds is None else self.clock() + seconds
        if self.dice.random() < 0.5:
            self._same(f"resume {queue}", lambda store: store.resume(queue))
        else:
            self._same(f"pause {queue} {until}", lambda store: store.pause(queue, until=until, who="eve", why="w"))

    def somebody_looks(self) -> None:
        name = self.dice.choice(self.names)
        self._same(f"circuit {name}", lambda store: store.circuit(name))
        self._same("circuits", lambda store: store.circuits())
        self._same(f"adaptive {name}", lambda store: store.adaptive(name))
        self._same("paused", lambda store: store.paused())

    PLOTS = (
        time_passes,
        the_clock_is_set_back,
        calls_are_rated,
        calls_need_places,
        calls_go_through_the_circuit,
        calls_need_everything,
        holders_speak,
        a_booking_is_given_back,
        outcomes_are_reported,
        an_operator_forces,
        a_limit_adapts,
        a_queue_is_paused,
        somebody_looks,
    )


breaker_states: list[Any] = ["forced_open", "forced_closed", "disabled", "closed"]
LIVES = {"redis": 200, "sqlite": 60, "postgresql": 60, "mariadb": 40}


@pytest.mark.parametrize("store_url", LIVES, indirect=True)
def test_a_store_answers_as_the_pure_functions_do(
    store_url: str, namespace: str, request: pytest.FixtureRequest
) -> None:
    """Waits, slots, views and circuits, to the last digit; times that pass, are waited out, or are set back.

    A failure prints the seed and what was asked until then.
    """

    @settings(
        max_examples=LIVES[request.node.callspec.params["store_url"]],
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**63))
    def live(seed: int) -> None:
        clock = MicroClock()
        name = f"{namespace}-{uuid.uuid4().hex[:8]}"
        with closing(open_permits(store_url, namespace=name, timeout=30, clock=clock)) as store:
            life = Life(store, clock, seed)
            for _ in range(STEPS):
                life.step()

    live()
