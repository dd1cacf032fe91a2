"""The rates of one downstream, spent from leases of this process instead of being asked for call by call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from taskguard.downstream.admittance import Do, Rest, Steps
from taskguard.downstream.desk import Desk
from taskguard.downstream.leases import LIFETIME, Leased, shared_bucket
from taskguard.errors import ConfigurationError
from taskguard.permits import RateAsk, Refusal
from taskguard.policies import TokenBucket
from taskguard.policies.calls import Limit

LONGEST = 60.0
"""Seconds for which who is refused is sent away, at most."""


def leasable(name: str, limits: Sequence[Limit], cost: float | Callable[..., float]) -> None:
    """Raise ConfigurationError where permits of these limits cannot be lent in batches, or pay for no call."""
    if not limits:
        raise ConfigurationError(f"{name}: leased=True has no rate whose permits it could lease; give rate=")
    for each in limits:
        if not isinstance(each.policy, TokenBucket) or each.key is not None:
            raise ConfigurationError(
                f"{name}: limit {each.name!r} cannot be leased; leased=True takes TokenBucket(...) without a key"
            )
        in_a_batch = each.policy.limit / each.policy.period * LIFETIME
        if each.policy.most - in_a_batch < 1:
            raise ConfigurationError(
                f"{name}: limit {each.name!r} has a burst of {each.policy.most:g}, a batch up to {in_a_batch:g} "
                f"permits; leased=True needs a burst of {math.ceil(in_a_batch + 1)} or more"
            )
        most = shared_bucket(each.policy, LIFETIME).most
        if not callable(cost) and cost > most:
            raise ConfigurationError(
                f"{name}: cost {cost:g} is over the {most:g} permits that limit {each.name!r} admits at once while its "
                "permits are leased; raise burst"
            )


class Leases:
    """One lease for each rate, made when it is first spent from, and anew at another desk."""

    def __init__(self) -> None:
        self._made: tuple[Desk, dict[str, Leased]] | None = None
        self._turn = 0.0

    def spend(self, rates: Sequence[RateAsk], desk: Desk, *, until: float) -> Steps[Refusal | None]:
        """Spend what these rates cost, waiting for it no longer than *until* by the desk's clock; else what refuses.

        Nothing is given back: what one rate has spent when another refuses is gone. Raises StoreError.
        """
        for rate in rates:
            lease = self._of(rate, desk)
            while rate.cost != 1.0 or not lease.spend():
                wait = yield Do(partial(lease.acquire, rate.cost), None, desk.in_process)
                if wait == 0.0:
                    break
                if desk.clock() + wait > until:
                    return Refusal("rate", rate.name, None if wait == math.inf else wait)
                yield Rest(wait)
        return None

    def turn(self, rate: RateAsk, wait: float, desk: Desk) -> float:
        """Seconds until it is worth coming back for one who was refused for *wait* seconds. Each has a turn of its own,
        at the rate's pace: all that one process refused would else come back for its next permit."""
        now = desk.clock()
        self._turn = min(max(self._turn + rate.cost * rate.policy.interval, now + wait), now + LONGEST)
        return self._turn - now

    def as_lent(self, rates: Sequence[RateAsk], desk: Desk) -> tuple[RateAsk, ...]:
        """These rates with what the store enforces while permits are leased: less at once."""
        return tuple(RateAsk(rate.name, self._of(rate, desk).shared, rate.cost) for rate in rates)

    def _of(self, rate: RateAsk, desk: Desk) -> Leased:
        made = self._made
        if made is None or made[0] is not desk:
            self._made = made = desk, {}
        lease = made[1].get(rate.name)
        if lease is None:
            assert isinstance(rate.policy, TokenBucket)
            lease = Leased(desk.store, rate.name, rate.policy, clock=desk.clock)
            lease = made[1].setdefault(rate.name, lease)
        return lease
