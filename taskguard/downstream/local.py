"""A rate of this process alone. Nobody is asked, so it costs a lock, a look at the clock and a few sums.

The sums are those of `limits.rates` for a bucket, in seconds of the monotonic clock, which nobody sets back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from math import inf

from taskguard.errors import ConfigurationError
from taskguard.limits.rates import ROUNDED
from taskguard.policies.rates import LeakyBucket, TokenBucket

SWEPT_FROM = 1024
"""Keys below which none is forgotten."""
REMEMBERED = 100
"""Costs whose sums are kept."""
NANOSECOND = 1e-9
"""Added to a wait, which would else be over a rounding too soon."""


class LocalRate:
    """*policy* within this process: exact, for any number of threads. A forked child goes on by itself.

    ``acquire(cost=1.0)`` spends permits: 0.0 when admitted, else the seconds until the call would be, if nobody else
    came (inf: never). ``acquire_for(key, cost=1.0)`` does so from a bucket of the key's own; a bucket that is full
    again is forgotten. Neither waits, and what is refused spends nothing.

    Raises ConfigurationError for a policy that is no bucket, and for a cost that is none.
    """

    __slots__ = ("acquire", "acquire_for", "policy")

    def __init__(self, policy: TokenBucket | LeakyBucket, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not isinstance(policy, (TokenBucket, LeakyBucket)):
            raise ConfigurationError(
                f"LocalRate: {policy!r} is no bucket; give TokenBucket(...) or LeakyBucket(...), or use a Downstream"
            )
        self.policy = policy
        self.acquire = _one(policy, clock)
        """Spend permits of the one bucket."""
        self.acquire_for = _many(policy, clock)
        """Spend permits of a key's own bucket."""


def _one(policy: TokenBucket | LeakyBucket, clock: Callable[[], float]) -> Callable[..., float]:
    lock, prices = threading.Lock(), _Prices(policy)
    usual, most = prices[1.0]
    at = backlog = 0.0

    def acquire(cost: float = 1.0) -> float:
        nonlocal at, backlog
        if cost == 1.0:
            need, span = usual, most
        else:
            need, span = prices[cost]
        with lock:
            now = clock()
            held = backlog - (now - at)
            held = held + need if held > 0.0 else need
            if held <= span:
                at = now
                backlog = held
                return 0.0
        return held - span + NANOSECOND

    return acquire


def _many(policy: TokenBucket | LeakyBucket, clock: Callable[[], float]) -> Callable[..., float]:
    lock, prices = threading.Lock(), _Prices(policy)
    buckets: dict[Hashable, tuple[float, float]] = {}
    sweep_at = SWEPT_FROM

    def acquire_for(key: Hashable, cost: float = 1.0) -> float:
        nonlocal sweep_at
        need, span = prices[cost]
        with lock:
            now = clock()
            if key in buckets:
                at, backlog = buckets[key]
                held = backlog - (now - at)
                held = held + need if held > 0.0 else need
            else:
                held = need
                if len(buckets) >= sweep_at:
                    for full in [each for each, (at, backlog) in buckets.items() if backlog <= now - at]:
                        del buckets[full]
                    sweep_at = max(SWEPT_FROM, 2 * len(buckets))
            if held <= span:
                buckets[key] = (now, held)
                return 0.0
        return held - span + NANOSECOND

    return acquire_for


class _Prices(dict[float, tuple[float, float]]):
    """By cost: what a call needs, and the most that may be held with it, in seconds."""

    def __init__(self, policy: TokenBucket | LeakyBucket) -> None:
        self._policy = policy
        self._burst = policy.most if isinstance(policy, TokenBucket) else 1.0

    def __missing__(self, cost: float) -> tuple[float, float]:
        if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 < cost < inf:
            raise ConfigurationError(f"LocalRate: a cost of {cost!r} is none; give a number above 0")
        interval = self._policy.interval
        price = (cost * interval, max(self._burst, cost) * interval * ROUNDED)
        if cost > self._policy.most:
            price = (inf, 0.0)
        if len(self) < REMEMBERED:
            self[cost] = price
        return price
