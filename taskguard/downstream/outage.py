"""A permit store that is down costs one wait, not one a call: a breaker on the store itself.

After a failure the store is left alone for a pause that grows while it fails; meanwhile every call raises
StoreUnavailable at once, and whoever asks decides by its own policy. When the pause is over one call is let through and
finds out. An outage is two log lines, one when it begins and one when it ends, whatever the traffic. Each process
learns for itself: that costs it one timeout, and needs no store.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from taskguard.downstream.leases import Lender
from taskguard.errors import StoreError, StoreUnavailable
from taskguard.permits import AdaptiveView, Answer, Ask, CircuitView, Outcomes, ProbeOutcome, Slot
from taskguard.policies.circuit import CircuitBreaker, CircuitState
from taskguard.ports import PermitStore

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE: Final = 0.1
"""Seconds after the first failure; each further one doubles it, with up to a quarter less by chance."""
LONGEST_PAUSE: Final = 2.0
"""So a store that is back is noticed within so many seconds."""
REFUSALS: Final = 3
"""Errors in a row, none of them an outage, that are taken for one: a wrong password fails every call, a bad key one."""


class Outage:
    """Whether the store is to be asked. For any number of threads: what a race costs is one question too many."""

    __slots__ = ("_chance", "_clock", "_errors", "_failures", "_told", "_until", "reason", "since")

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, chance: Callable[[], float] = random.random
    ) -> None:
        self._clock, self._chance = clock, chance
        self._failures = self._errors = 0
        self._until = 0.0
        self.since: float | None = None
        self.reason = self._told = ""

    @property
    def left(self) -> float:
        """Seconds until the store is asked again; 0.0: at once."""
        return max(0.0, self._until - self._clock()) if self.since is not None else 0.0

    def enter(self) -> None:
        """Raise StoreUnavailable while the store is to be left alone. Else, in an outage: this call finds out."""
        if self.since is None:
            return
        now = self._clock()
        if now < self._until:
            raise StoreUnavailable(self._told)
        self._until = now + self._pause()  # the others wait for what this one finds

    def failed(self, error: StoreError) -> None:
        """A call has failed."""
        if not isinstance(error, StoreUnavailable):
            self._errors += 1
            if self._errors < REFUSALS:
                return
        self._failures += 1
        self.reason = str(error)
        now = self._clock()
        pause = self._pause()
        self._until = now + pause
        self._told = f"{self.reason}; not asked again within {pause:.1f} s"
        if self.since is None:
            self.since = now
            logger.warning("permit store: %s; limits and circuits go by on_store_down until it answers", self.reason)

    def succeeded(self) -> None:
        """A call was answered."""
        if self._errors:
            self._errors = 0
        if self.since is not None:
            lasted, self.since = self._clock() - self.since, None
            self._failures, self._until = 0, 0.0
            logger.warning("permit store: answers again after %.1f s", lasted)

    def _pause(self) -> float:
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(30, max(0, self._failures - 1)))
        return longest * (1 - 0.25 * self._chance())


class Shielded:
    """A `PermitStore` that is asked through an `Outage`: every call is answered, fails within the store's timeout, or
    raises StoreUnavailable at once."""

    def __init__(self, store: PermitStore, outage: Outage | None = None) -> None:
        self.store = store
        self.outage = Outage() if outage is None else outage
        if isinstance(store, Lender):
            self.lend = partial(self._ask, store.lend)

    def admit(self, ask: Ask) -> Answer:
        outage = self.outage
        if outage.since is not None:
            outage.enter()
        try:
            answer = self.store.admit(ask)
        except StoreError as exc:
            outage.failed(exc)
            raise
        if outage.since is not None or outage._errors:
            outage.succeeded()
        return answer

    def _ask(self, method: Callable[..., T], *args: Any, **options: Any) -> T:
        self.outage.enter()
        try:
            answer = method(*args, **options)
        except StoreError as exc:
            self.outage.failed(exc)
            raise
        self.outage.succeeded()
        return answer

    def release(self, slots: Sequence[Slot]) -> None:
        self._ask(self.store.release, slots)

    def renew_slots(self, slots: Sequence[Slot], *, lease: float) -> list[bool]:
        return self._ask(self.store.renew_slots, slots, lease=lease)

    def unbook(self, name: str, slot_at: float) -> None:
        self._ask(self.store.unbook, name, slot_at)

    def report(
        self, name: str, policy: CircuitBreaker, outcomes: Outcomes, probe: ProbeOutcome | None = None
    ) -> CircuitView:
        return self._ask(self.store.report, name, policy, outcomes, probe)

    def circuit(self, name: str) -> CircuitView:
        return self._ask(self.store.circuit, name)

    def circuits(self) -> list[CircuitView]:
        return self._ask(self.store.circuits)

    def watch_circuits(self, changed: Callable[[CircuitView], None], *, stop: Callable[[], bool]) -> None:
        self.store.watch_circuits(changed, stop=stop)

    def watch_paused(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        self.store.watch_paused(told, stop=stop)

    def force(self, name: str, state: CircuitState, *, until: float | None, who: str, why: str) -> CircuitView:
        return self._ask(self.store.force, name, state, until=until, who=who, why=why)

    def adapt(self, name: str, limit: float, *, why: str) -> AdaptiveView:
        return self._ask(self.store.adapt, name, limit, why=why)

    def adaptive(self, name: str) -> AdaptiveView | None:
        return self._ask(self.store.adaptive, name)

    def pause(self, queue: str, *, until: float | None, who: str, why: str) -> None:
        self._ask(self.store.pause, queue, until=until, who=who, why=why)

    def resume(self, queue: str) -> bool:
        return self._ask(self.store.resume, queue)

    def paused(self) -> Mapping[str, tuple[float | None, str, str]]:
        return self._ask(self.store.paused)

    def now(self) -> float:
        return self._ask(self.store.now)

    def close(self) -> None:
        self.store.close()
