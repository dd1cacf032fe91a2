"""Demand: how much was asked of each limit, whether it was served or not, and who is about to reach one.

Counted in this process without a round trip and added to the store in batches, twice a second at most. A process tells
apart as many callers as `TOP`, the busiest of each batch; the rest is counted together, so a flood of made-up names
costs nothing. What a process has not yet added is lost when it is killed: half a second of counts.

A warning comes **before** the limit: by what an answer says is left (any algorithm that can hold five calls), and by
the fleet's sum of the minute (limits of up to a minute, also buckets that have just been emptied and filled again). It
comes once a window from each process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from taskguard.downstream.tending import begins_anew, tending
from taskguard.errors import ConfigurationError, StoreError
from taskguard.events import Event, Observer
from taskguard.permits import RateView
from taskguard.policies.checks import number
from taskguard.policies.notation import notation
from taskguard.policies.rates import LeakyBucket, Rate
from taskguard.ports import DemandStore
from taskguard.rules import Identity, Rule, RuleSet
from taskguard.traffic import OTHER, WINDOW, Asked, Counted

FLUSH = 0.5
"""Seconds between two batches."""
TOP = 200
"""Rows of one batch that are told apart."""
HELD = 4 * TOP
"""Rows held until then."""
LEAST = 5.0
"""Permits below which "nearly used up" says nothing of a limit: one call empties it."""
TOLD = 10_000
"""Warnings remembered, so that none comes twice in a window."""

Key = tuple[str, str, str]


class Demand:
    """What this process adds to a `DemandStore`. *near*: the share of a limit from which it warns, 0.8 by default.

    *rules*: the rules that are in effect, to know the limits by. Safe for any number of threads, and for forks.
    """

    due_at: float

    def __init__(
        self,
        store: DemandStore,
        *,
        rules: Callable[[], RuleSet | None],
        near: float = 0.8,
        notify: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.near = number("Demand.near", near, least=0.0)
        if not 0 < self.near <= 1:
            raise ConfigurationError(
                f"Demand.near: {near!r} is no share; give more than 0, up to 1 (0.8 is four fifths)"
            )
        self._store = store
        self._rules = rules
        self._notify = notify
        self._clock = clock
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """A child counts from nothing: what was counted before it is its parent's to add."""
        self._lock = threading.Lock()
        self._held: dict[Key, list[float]] = {}
        self._sums: dict[Key, Counted] = {}
        self._told: dict[tuple[str, str, float, str], int] = {}
        self.due_at = float("inf")
        self._tended = False

    def count(self, identity: Identity, rules: Sequence[Rule], cost: float, *, refused_by: Rule | None = None) -> None:
        """A call that these rules applied to was let in, or was refused by one of them."""
        if refused_by is not None:
            self._add(identity, refused_by.id, 0.0, cost)
            return
        for rule in rules:
            self._add(identity, rule.id, cost, 0.0)
        if not rules:
            self._add(identity, "", cost, 0.0)

    def _add(self, identity: Identity, rule: str, accepted: float, refused: float) -> None:
        key = (identity.client, identity.endpoint or identity.task, rule)
        with self._lock:
            row = self._held.get(key)
            if row is None:
                if len(self._held) >= HELD:
                    key = (OTHER, OTHER, OTHER)
                row = self._held.setdefault(key, [0.0, 0.0])
            row[0] += accepted
            row[1] += refused
            wake = self.due_at == float("inf")
            if wake:
                self.due_at = self._clock() + FLUSH
        if wake:
            if not self._tended:
                self._tended = True
                tending.add(self)
            else:
                tending.wake()

    def tend(self) -> None:
        """Add what is held; the tending thread calls it."""
        self.due_at = float("inf")
        try:
            self.flush()
        except StoreError:
            self.due_at = self._clock() + 2 * FLUSH

    def flush(self) -> None:
        """Add what is held to the store, now. Raises StoreError, and then holds it on."""
        with self._lock:
            held, self._held = self._held, {}
        if not held:
            return
        try:
            found = self._store.add(_batch(held))
        except StoreError:
            with self._lock:
                for key, (accepted, refused) in held.items():
                    kept = key if key in self._held or len(self._held) < HELD else (OTHER, OTHER, OTHER)
                    row = self._held.setdefault(kept, [0.0, 0.0])
                    row[0] += accepted
                    row[1] += refused
            raise
        self._judge(found)

    def _judge(self, found: Sequence[Counted]) -> None:
        if not found or self._notify is None:
            return
        at = found[0].window_at
        with self._lock:
            if any(each.window_at != at for each in self._sums.values()) or len(self._sums) > HELD:
                self._sums.clear()
            self._sums.update(((each.client, each.endpoint, each.rule), each) for each in found)
            sums = list(self._sums.values())
        rules = self._rules() or RuleSet()
        known = {rule.id: rule for rule in rules.rules}
        totals: dict[tuple[str, str], float] = {}
        members: dict[tuple[str, str], Counted] = {}
        for each in sums:
            if (rule := known.get(each.rule)) is not None:
                counter = (rule.id, counter_of(rule, each))
                totals[counter] = totals.get(counter, 0.0) + each.accepted + each.refused
                members[counter] = each
        for where, total in totals.items():
            id, counter_name = where
            for rate in known[id].limits:
                if rate.period <= WINDOW and total >= self.near * rate.limit * WINDOW / rate.period:
                    each = members[where]
                    per = f"{total:g} in the minute, by the whole fleet"
                    self._warn(known[id], rate, counter_name, each.client, each.endpoint, per)

    def seen(self, identity: Identity, rule: Rule, rate: Rate, view: RateView) -> None:
        """What is left of one limit after a call that was let in: warns where it is nearly used up. Never waits."""
        if self._notify is None or rate.most < LEAST or isinstance(rate, LeakyBucket):
            return
        used = 1.0 - view.remaining / rate.most
        if used >= self.near:
            endpoint = identity.endpoint or identity.task
            each = Counted(window_at=0.0, client=identity.client, endpoint=endpoint, rule=rule.id)
            left = f"{view.remaining:g} of {rate.most:g} left"
            self._warn(rule, rate, counter_of(rule, each), identity.client, endpoint, left)

    def _warn(self, rule: Rule, rate: Rate, counter: str, client: str, endpoint: str, detail: str) -> None:
        window = int(self._clock() // max(WINDOW, rate.period))
        key = (rule.id, type(rate).__name__, rate.period, counter)
        with self._lock:
            if self._told.get(key) == window:
                return
            if len(self._told) >= TOLD:
                self._told.clear()
            self._told[key] = window
        assert self._notify is not None
        self._notify(
            Event(
                name="limit_near",
                key=client,
                detail=f"{endpoint or 'all endpoints'}: rule {rule.id}, {notation(rate)}: {detail}",
            )
        )


def counter_of(rule: Rule, asked: Asked) -> str:
    """Which of a rule's counters a row belongs to, as far as rows know."""
    return repr([getattr(asked, name) for name in rule.per or () if name in ("client", "endpoint")])


def _batch(held: dict[Key, list[float]]) -> list[Asked]:
    """The busiest rows, and one for all others."""
    busiest = sorted(held.items(), key=lambda item: -sum(item[1]))
    rows = [
        Asked(client=client, endpoint=endpoint, rule=rule, accepted=accepted, refused=refused)
        for (client, endpoint, rule), (accepted, refused) in busiest[:TOP]
    ]
    if rest := busiest[TOP:]:
        accepted, refused = (sum(sums[n] for _, sums in rest) for n in (0, 1))
        rows.append(Asked(client=OTHER, endpoint=OTHER, rule=OTHER, accepted=accepted, refused=refused))
    return rows
