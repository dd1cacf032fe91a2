"""A limit that finds its own place: additive increase, multiplicative decrease (AIMD, Chiu and Jain 1989).

`step` is the pure transition: it works from what the store keeps, the limit and when it last changed, so that many
processes which see the same trouble at once take one step and not one each: two that race compute the same limit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from taskguard.clock import seconds
from taskguard.downstream.answers import Answer
from taskguard.downstream.desk import Desk
from taskguard.downstream.tallies import Tally
from taskguard.errors import StoreError
from taskguard.events import Event
from taskguard.permits import AdaptiveView
from taskguard.policies.adaptive import Adaptive
from taskguard.policies.rates import TokenBucket

__all__ = ["Adaptive", "Step", "Tuner", "bucket_of", "step"]

IN_USE = 0.1
"""A limit of which a process uses less than this share is not raised by what that process sees."""

Signal = Literal["well", "too_much", "slow"]


@dataclass(frozen=True, slots=True)
class Step:
    """The limit from now on, and why."""

    limit: float
    why: str


def bucket_of(policy: Adaptive) -> TokenBucket:
    """The token bucket that enforces it, at its start."""
    burst = policy.burst if policy.burst is not None else max(1.0, policy.start / policy.period / 10)
    return TokenBucket(policy.start, policy.period, burst)


def step(policy: Adaptive, view: AdaptiveView | None, signal: Signal, now: float, *, what: str = "") -> Step | None:
    """The next limit, None where it stays. *now* and the changes' instants are the store's.

    Lowered at most once per interval, so that the answers to calls of before the last step do not lower it again;
    raised only when an interval has passed without any change.
    """
    limit = policy.start if view is None else view.limit
    last = view.changes[0] if view is not None and view.changes else None
    if last is not None and 0 <= now - last[0] < seconds(policy.interval):
        return None
    if signal == "well":
        raised = min(policy.most, limit + policy.increase)
        return Step(raised, f"raised from {limit:g}: {what or 'all went well'}") if raised > limit else None
    lowered = max(policy.least, limit * policy.decrease)
    reason = what or ("it said too much" if signal == "too_much" else "it was slow")
    return Step(lowered, f"lowered from {limit:g}: {reason}") if lowered < limit else None


class Tuner:
    """Feeds one adaptive limit with what a process sees. The store is told by the tending thread, not by the call."""

    def __init__(self, name: str, policy: Adaptive) -> None:
        self.name, self.policy = name, policy
        self.bucket = bucket_of(policy)
        self.limit = policy.start
        self.why = "where it began"
        self._interval = seconds(policy.interval)
        self._latency = None if policy.latency is None else seconds(policy.latency)
        self._well = Tally()
        self._counted = 0
        self._not_before = -math.inf
        self._began = -math.inf

    def saw(self, desk: Desk, answer: Answer | None, elapsed: float, *, failed: bool) -> None:
        """A call has ended."""
        now = time.monotonic()
        if answer is not None and answer.throttled:
            wait = "" if answer.wait is None else f", Retry-After {answer.wait:g} s"
            self._propose(desk, now, "too_much", f"status {answer.status}{wait}")
        elif failed or (self._latency is not None and elapsed > self._latency):
            self._propose(desk, now, "slow", f"a call took {elapsed:.3g} s")
        else:
            self._well.add()
            if self._began == -math.inf:
                self._began = now
            if now >= self._not_before and now - self._began >= self._interval:
                total, since = self._well.total(), now - self._began
                many, self._counted, self._began = total - self._counted, total, now
                if many / since * self.policy.period >= self.limit * IN_USE:
                    self._propose(desk, now, "well", f"{many} calls ended well in {since:.3g} s")

    def _propose(self, desk: Desk, now: float, signal: Signal, what: str) -> None:
        if now < self._not_before:
            return
        self._not_before = now + self._interval / (2 if signal == "well" else 1)
        desk.soon(lambda: self._adapt(desk, signal, what))

    def _adapt(self, desk: Desk, signal: Signal, what: str) -> None:
        try:
            view = desk.store.adaptive(self.name)
            taken = step(self.policy, view, signal, desk.now(), what=what)
            if taken is not None:
                self.limit = desk.store.adapt(self.name, taken.limit, why=taken.why).limit
                self.why = taken.why
                desk.denials.forget(self.name)
                desk.notify(Event(name="limit_adapted", key=self.name, detail=f"{self.limit:g}: {taken.why}"))
        except StoreError:
            return
