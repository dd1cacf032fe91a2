"""Permits taken from the store in batches and spent locally, for rates at which a round trip a call is too dear.

A lease of *n* permits is debited from the shared bucket at once and may be spent for *lifetime* seconds, counted from
before the store was asked; what is left then is dropped. So every permit that is spent in ``[t, t + w]`` was debited in
``[t - lifetime, t + w]``, and with a shared bucket of ``burst - rate * lifetime``

    admitted(w) <= burst + rate * w        for every window, any number of processes, however they hoard and dump.

Nothing is given back: while a lease is held the bucket may fill to its brim, and permits returned to it then were
spent twice (2.7 bursts over, in simulation). A process that dies with permits only admits too little. The bound needs
all callers of a limit to lease: beside callers that ask the store directly it is ``burst + rate * (w + lifetime)``.

How many permits a lease has follows the process's own demand: doubled when they were spent in less than half of the
lifetime, halved when more than half of them were dropped. Rejected: a background thread that refills ahead of demand.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, runtime_checkable

from taskguard.clock import Duration, seconds
from taskguard.errors import ConfigurationError
from taskguard.permits import Answer, Ask, Permit, RateAsk
from taskguard.policies.rates import TokenBucket
from taskguard.ports import PermitStore

LIFETIME: Final = 0.05
"""Seconds: 0.08 round trips an admitted call at 10,000 a second over four processes, and 2 % dropped."""
PACE: Final = 0.1
"""After a lease that fell short the store is asked again no sooner than after this share of the lifetime."""


_alive: weakref.WeakSet[Leased] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Loan:
    """*permits* taken from the bucket; *retry_after*: seconds until there is one more, where it fell short."""

    permits: int
    retry_after: float = 0.0


@runtime_checkable
class Lender(Protocol):
    """A store that can give a part of what was asked for in one step. Others are asked twice."""

    def lend(self, name: str, policy: TokenBucket, *, most: int) -> Loan:
        """Take up to *most* permits of the limit *name*: as many as the bucket has, none while others stand in line."""
        ...


def shared_bucket(policy: TokenBucket, lifetime: float) -> TokenBucket:
    """What the store enforces, so that *policy* holds whatever the processes do with their leases.

    Raises ConfigurationError where the burst is too small for leases of this lifetime.
    """
    burst = policy.most - policy.limit / policy.period * lifetime
    if burst < 1:
        longest = (policy.most - 1) * policy.period / policy.limit
        way_out = f"lower lifetime to {longest:.3g} s or raise burst" if longest > 0 else "raise burst"
        raise ConfigurationError(
            f"Leased: lifetime {lifetime:g} s takes {policy.limit / policy.period * lifetime:g} permits from a burst "
            f"of {policy.most:g} and leaves less than one; {way_out}"
        )
    return TokenBucket(policy.limit, policy.per, burst)


class Leased:
    """The limit *name* of a store, spent from local leases. For any number of threads and forked children.

    strict: whether the bound is ``burst + rate * w``; without it the shared bucket keeps its whole burst, and the
        bound is ``burst + rate * (w + lifetime)``.
    most: permits of the largest lease; by default what the rate yields in a lifetime, and at most the shared burst.
    """

    def __init__(
        self,
        store: PermitStore,
        name: str,
        policy: TokenBucket,
        *,
        lifetime: Duration = LIFETIME,
        strict: bool = True,
        most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.policy = name, policy
        self.lifetime = seconds(lifetime, what="Leased.lifetime")
        if self.lifetime == 0:
            raise ConfigurationError("Leased.lifetime: 0 leaves no time to spend a permit; give 0.02 or more")
        self.shared = shared_bucket(policy, self.lifetime) if strict else policy
        usual = min(self.shared.most, policy.limit / policy.period * self.lifetime)
        self.most = max(1, math.floor(usual if most is None else min(most, self.shared.most)))
        self._store, self._clock = store, clock
        self._lend = store.lend if isinstance(store, Lender) else partial(lend_by_asking, store.admit)
        self._held: deque[float] = deque()  # a permit is the instant until which it may be spent
        self._size = 1
        self._not_before = -math.inf
        self._lent_at = -math.inf
        self._dropped = 0
        _alive.add(self)

    def forget(self) -> None:
        """Drop what is held. A forked child does: its parent spends the same permits."""
        self._held.clear()

    def spend(self) -> bool:
        """Spend one permit that is held already, without a word to the store."""
        return self._held_until(self._clock())

    def acquire(self, cost: float = 1.0) -> float:
        """Spend *cost* permits: 0.0 when admitted, else the seconds until it is worth trying again (inf: never).

        Raises StoreUnavailable where the store had to be asked and did not answer.
        """
        if cost != 1.0:
            return self._acquire_at_once(cost)
        try:
            if self._held.popleft() > self._clock():
                return 0.0
            self._dropped += 1
        except IndexError:
            pass
        return self._acquire_slowly()

    def _acquire_slowly(self) -> float:
        now = self._clock()
        if self._held_until(now):
            return 0.0
        if now < self._not_before:
            return self._not_before - now
        self._follow_demand(now)
        wanted = self._size
        loan = self._lend(self.name, self.shared, most=wanted)
        if loan.permits < wanted:
            self._not_before = now + max(loan.retry_after, self.lifetime * PACE)
        if not loan.permits:
            return max(self._not_before - self._clock(), 1e-6)
        self._lent_at, self._dropped = now, 0
        if loan.permits > 1:
            self._held.extend([now + self.lifetime] * (loan.permits - 1))
        return 0.0 if now + self.lifetime > self._clock() else self._came_too_late()

    def _held_until(self, now: float) -> bool:
        """Spend one permit that is held, drop those that are over."""
        try:
            while self._held.popleft() <= now:
                self._dropped += 1
        except IndexError:
            return False
        return True

    def _came_too_late(self) -> float:
        """The answer took longer than the lease: what it brought is not spent, for the bound's sake."""
        self._not_before = self._clock() + self.lifetime * PACE
        return self.lifetime * PACE

    def _follow_demand(self, now: float) -> None:
        if self._dropped * 2 > self._size:
            self._size = max(1, self._size // 2)
        elif now - self._lent_at < self.lifetime / 2:
            self._size = min(self.most, self._size * 2)

    def _acquire_at_once(self, cost: float) -> float:
        """A call of another cost is debited when it is made: a lease of no lifetime, within the same bound."""
        answer = self._store.admit(Ask(rates=(RateAsk(self.name, self.shared, cost),)))
        if isinstance(answer, Permit):
            return 0.0
        return math.inf if answer.retry_after is None else max(answer.retry_after, 1e-6)


def lend_by_asking(admit: Callable[[Ask], Answer], name: str, policy: TokenBucket, *, most: int) -> Loan:
    """What `Lender.lend` answers, of any store: if there is too little, what was left is asked for."""
    answer = admit(Ask(rates=(RateAsk(name, policy, float(most)),)))
    if isinstance(answer, Permit):
        return Loan(most)
    there = min(most - 1, math.floor(answer.rates[0].remaining) if answer.rates else 0)
    if there > 0 and isinstance(admit(Ask(rates=(RateAsk(name, policy, float(there)),))), Permit):
        return Loan(there, policy.interval)
    return Loan(0, policy.interval)


def _forget_all() -> None:
    for leased in list(_alive):
        leased.forget()


os.register_at_fork(after_in_child=_forget_all)
