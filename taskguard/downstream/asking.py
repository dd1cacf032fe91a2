"""What one call asks the store for: its rates by name, a place, the circuit's word, and whether it books."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from taskguard.downstream.admittance import Call, booked_for, booking, pause_before_next_try
from taskguard.downstream.desk import Desk
from taskguard.downstream.limitkeys import counter, key_of
from taskguard.limits.adaptive import Tuner
from taskguard.permits import Ask, CircuitAsk, RateAsk, Refusal, SlotAsk
from taskguard.policies.adaptive import Adaptive
from taskguard.policies.calls import Limit

LAST_LOOK = 0.001
"""Seconds before the end of the wait for a fleet's place from which it is not asked for again."""
_REMEMBERED = 100
"""Costs for which what is asked is kept: frozen values are dear to make."""


class Asker:
    """Makes the questions of one downstream."""

    def __init__(self, name: str, limits: tuple[Limit, ...], tuners: Mapping[str, Tuner]) -> None:
        self.name, self.limits = name, limits
        self._tuners = tuners
        self._keyed = any(each.key is not None for each in limits)
        self._unkeyed: dict[float, tuple[RateAsk, ...]] = {}

    def ask(
        self, call: Call, *, slot: SlotAsk | None = None, circuit: CircuitAsk | None = None, paid: bool = False
    ) -> Ask:
        """The question of this call; one that is *paid* asks for no rates."""
        rates = () if paid else self._each(call) if self._keyed else self._alike(call.cost)
        return Ask(
            rates=rates if not call.also else (*rates, *call.also),
            slot=slot,
            circuit=circuit,
            book=booking.get(),
            booked=self.name in booked_for.get(),
        )

    def alike(self, cost: float) -> tuple[RateAsk, ...] | None:
        """The rates of a call of this cost where no limit has a key; None where one has, or can never admit it."""
        found = self._unkeyed.get(cost)
        if found is None:
            if self._keyed:
                return None
            found = self._alike(cost)
            if any(rate.cost > rate.policy.most and not rate.adaptive for rate in found):
                return None
            if len(self._unkeyed) < _REMEMBERED:
                self._unkeyed[cost] = found
        return found

    def _alike(self, cost: float) -> tuple[RateAsk, ...]:
        return self._unkeyed.get(cost) or tuple(self._one(each, each.name, cost) for each in self.limits)

    def _each(self, call: Call) -> tuple[RateAsk, ...]:
        return tuple(self._one(each, self._name(each, call), call.cost) for each in self.limits)

    def _one(self, limit: Limit, name: str, cost: float) -> RateAsk:
        if isinstance(limit.policy, Adaptive):
            return RateAsk(name, self._tuners[limit.name].bucket, cost, adaptive=True)
        return RateAsk(name, limit.policy, cost)

    def _name(self, limit: Limit, call: Call) -> str:
        if limit.key is None:
            return limit.name
        key = call.key
        if key is None:
            key = key_of(limit.key, call.of, call.args, call.kwargs, what=f"{self.name}: limit {limit.name}")
        return counter(limit.name, key)


def again(ask: Ask, *, book: bool, booked: bool | None = None) -> Ask:
    """The same question once more."""
    return Ask(
        rates=ask.rates,
        slot=ask.slot,
        circuit=ask.circuit,
        book=book,
        booked=ask.booked if booked is None else booked,
    )


def known(desk: Desk, ask: Ask) -> Refusal | None:
    """A refusal that need not be asked for."""
    for rate in ask.rates:
        if rate.cost > rate.policy.most and not rate.adaptive:
            return Refusal("rate", rate.name, None)
    if ask.book or ask.booked:
        return None
    denied = desk.denied(ask)
    if denied is None:
        return None
    return Refusal("rate", denied[0], None if denied[1] == inf else denied[1])


def wait_for(refusal: Refusal, now: float, *, rate_until: float, slot_until: float) -> float | None:
    """Seconds to wait before the next question; None: no more questions."""
    match refusal.by:
        case "circuit":
            return None
        case "slot":
            left = slot_until - now
            return min(pause_before_next_try(refusal.retry_after), left) if left > LAST_LOOK else None
        case "rate":
            wait = refusal.retry_after if refusal.slot_in is None else refusal.slot_in
            return None if wait is None or now + wait > rate_until else wait + 1e-4
