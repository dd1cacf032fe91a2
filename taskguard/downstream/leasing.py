"""The rates of one downstream, spent from leases of this process instead of being asked for call by call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from taskguard.downstream.admittance import Do, Rest, Steps
from taskguard.downstream.desk import Desk
from taskguard.downstream.leases import LIFETIME, Leased, shared_bucket
from taskguard.errors import ConfigurationError
from taskguard.permits import RateAsk, Refusal
from taskguard.policies import TokenBucket
from taskguard.policies.calls import Limit


def leasable(name: str, limits: Sequence[Limit]) -> None:
    """Raise ConfigurationError where permits of these limits cannot be lent in batches."""
    if not limits:
        raise ConfigurationError(f"{name}: leased=True has no rate whose permits it could lease; give rate=")
    for each in limits:
        if not isinstance(each.policy, TokenBucket) or each.key is not None:
            raise ConfigurationError(
                f"{name}: limit {each.name!r} cannot be leased; leased=True takes TokenBucket(...) without a key"
            )
        shared_bucket(each.policy, LIFETIME)


class Leases:
    """One lease for each rate, made when it is first spent from, and anew at another desk."""

    def __init__(self) -> None:
        self._desk: Desk | None = None
        self._found: dict[str, Leased] = {}

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

    def _of(self, rate: RateAsk, desk: Desk) -> Leased:
        if self._desk is not desk:
            self._desk, self._found = desk, {}
        lease = self._found.get(rate.name)
        if lease is None:
            assert isinstance(rate.policy, TokenBucket)
            lease = Leased(desk.store, rate.name, rate.policy, clock=desk.clock)
            lease = self._found.setdefault(rate.name, lease)
        return lease
