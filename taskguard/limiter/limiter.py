"""The limiter: which rules a call falls under, and whether it may go on. One round trip to the permit store, at most.

What was refused a moment ago is refused from memory for as long as that must hold. Rules in shadow are asked apart, and
only told. A store that does not answer costs one wait of its timeout, then nothing until it is asked again; meanwhile
calls go on or are refused, as declared, and an event says so. A coroutine that waits for a free thread waits for this
process, not for the store: that is never taken for an outage.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from taskguard.clock import wall_clock
from taskguard.downstream.denials import Denials
from taskguard.downstream.outage import Shielded
from taskguard.downstream.storeclock import StoreClock
from taskguard.downstream.tallies import Tally
from taskguard.downstream.tending import begins_anew
from taskguard.downstream.threads import Errand, StoreThreads
from taskguard.errors import StoreError
from taskguard.events import Event, Observer
from taskguard.forks import undisturbed
from taskguard.limiter.decision import Decision, Standing, Turn, refusal
from taskguard.limiter.demand import Demand
from taskguard.limiter.rulebook import FixedRules
from taskguard.permits import Ask, RateAsk, RateView, Refusal
from taskguard.policies.checks import one_of
from taskguard.ports import PermitStore
from taskguard.rules import REMEMBERED, Identity, Rule, RuleSet

OnStoreDown = Literal["allow", "refuse"]
THREADS = 32
"""Threads in which coroutines wait for the store, where the store does not say how many it bears (``askers``)."""
QUEUE = 1024
"""Coroutines that wait for the store, or for such a thread. Who comes then is refused."""
RETRY_DOWN = 1.0
"""Seconds after which a call that was refused because the store is down, or asked by too many, may come again."""


class Rules(Protocol):
    """Where rules come from: a `RuleBook`, or `FixedRules`."""

    def rules(self, *, patience: float = 0.0) -> RuleSet | None:
        """The rules, None where they could not be read yet."""

    def saw(self, version: int) -> None:
        """A permit's answer speaks of this version."""


class Limiter:
    """Decides by *rules* and *permits*. For any number of threads and forked children.

    demand: where calls are counted. on_store_down: "allow" or "refuse" calls while the store does not answer, or the
    rules could not be read yet; ``store_down_total`` counts those calls, ``crowded_total`` those that were refused
    because too many coroutines wait. timeout: seconds a coroutine waits at most once a thread asks for it, and the
    first calls for the rules. clock: by which refusals are remembered.
    """

    def __init__(
        self,
        rules: Rules,
        permits: PermitStore,
        *,
        demand: Demand | None = None,
        notify: Observer | None = None,
        on_store_down: OnStoreDown = "allow",
        timeout: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        one_of("Limiter.on_store_down", on_store_down, ("allow", "refuse"))
        self.rules = rules
        self.permits = permits if isinstance(permits, Shielded) else Shielded(permits)
        self.demand = demand
        self._in_process = isinstance(rules, FixedRules) and bool(getattr(self.permits.store, "in_process", False))
        self.on_store_down = on_store_down
        self._clock = clock
        self._store_clock = StoreClock(self.permits.now, wall_clock)
        self.timeout = timeout
        self._notify = notify
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """A child asks in threads of its own."""
        self._denials = Denials(clock=self._clock)
        self._plans: dict[tuple[Identity, float], _Plan] = {}
        self._planned_by: RuleSet | None = None
        self._is_down = False
        self.store_down_total, self.crowded_total = Tally(), Tally()
        threads = int(getattr(self.permits.store, "askers", THREADS))
        self._threads = StoreThreads("taskguard-limiter", threads=threads, queue=QUEUE)

    def learn(self) -> None:
        """Begin to read the rules and to connect, so that the first call need not wait for that. Does not wait."""
        self.rules.rules()
        threading.Thread(target=self._connect, name="taskguard-limiter-connects", daemon=True).start()

    def _connect(self) -> None:
        with suppress(StoreError), undisturbed:
            self.permits.now()

    # -- deciding -----------------------------------------------------------------------------------------------------

    def check(self, identity: Identity, cost: float = 1.0, *, book: bool = False, booked: bool = False) -> Decision:
        """Decide, and count. With *book*, a refusal by a rule that queues takes a slot; *booked*: the call comes back
        for it."""
        rules = self.rules.rules(patience=self.timeout)
        if rules is None:
            return self._down(identity, "the rules could not be read yet")
        plan = self._plan(rules, identity, cost)
        if plan.shadows:
            self._try_shadows(identity, plan.shadows, cost)
        book = book and plan.queues
        known = self._known(rules, plan, identity, cost, asks=book or booked)
        if known is not None:
            return known
        asked_at = self._clock()
        try:
            answer = self.permits.admit(Ask(rates=plan.rates, book=book, booked=booked) if book or booked else plan.ask)
        except StoreError as exc:
            return self._down(identity, str(exc), rules.version)
        if self._is_down:
            self._is_down = False
            if self._notify is not None:
                self._notify(Event(name="permits_back", detail="limits: the permit store answers again"))
        self.rules.saw(answer.version)
        if isinstance(answer, Refusal):
            if not (book or booked):
                self._denials.keep(answer.name, cost, answer.retry_after, asked_at=asked_at)
            return self._refused(identity, plan, answer, cost, rules.version)
        self._count(identity, plan.holding, cost, None)
        standings = _standings(plan, answer.rates)
        if self.demand is not None:
            for each in standings:
                self.demand.seen(identity, each.rule, each.rate, each.view)
        return Decision(allowed=True, identity=identity, standings=standings, version=rules.version)

    def _known(self, rules: RuleSet, plan: _Plan, identity: Identity, cost: float, *, asks: bool) -> Decision | None:
        """What need not be asked for; with *asks* that it is refused must be."""
        if not plan.asks:
            self._count(identity, (), cost, None)
            return Decision(allowed=True, identity=identity, version=rules.version)
        if not asks and (denied := self._denied(plan)) is not None:
            return self._refused(identity, plan, denied, cost, rules.version)
        return None

    def _plan(self, rules: RuleSet, identity: Identity, cost: float) -> _Plan:
        if rules is not self._planned_by:  # other rules may admit what was refused
            self._denials, self._plans, self._planned_by = Denials(clock=self._clock), {}, rules
        plan = self._plans.get((identity, cost))
        if plan is not None:
            return plan
        plan = _Plan.of(rules.match(identity), identity, cost)
        if len(self._plans) >= REMEMBERED:
            self._plans.clear()
        self._plans[identity, cost] = plan
        return plan

    def _denied(self, plan: _Plan) -> Refusal | None:
        if plan.never:  # refused for good, which the store says
            return None
        name, left = "", 0.0
        for ask in plan.rates:
            wait = self._denials.left(ask.name, ask.cost)
            if wait > left:
                name, left = ask.name, wait
        if not name:
            return None
        return Refusal("rate", name, left, rates=(RateView(name, plan.asks[name][1].policy.limit, 0.0, left),))

    def _refused(self, identity: Identity, plan: _Plan, refusal: Refusal, cost: float, version: int) -> Decision:
        rule = plan.asks[refusal.name][0]
        self._count(identity, (), cost, rule)
        queues = rule.over_limit == "queue"
        slot_at = None if refusal.slot_in is None else self._store_clock.now() + refusal.slot_in
        if slot_at is not None and not queues:
            self._unbook(refusal.name, slot_at)
        return Decision(
            allowed=False,
            identity=identity,
            standings=_standings(plan, refusal.rates),
            refused_by=rule,
            limit=refusal.name,
            retry_after=refusal.retry_after,
            slot_in=refusal.slot_in if queues else None,
            slot_at=slot_at if queues else None,
            version=version,
        )

    def _try_shadows(self, identity: Identity, shadows: Sequence[Rule], cost: float) -> None:
        for rule in shadows:
            try:
                answer = self.permits.admit(Ask(rates=rule.asks(identity, cost)))
            except StoreError:
                return
            refused = isinstance(answer, Refusal)
            self._count(identity, (rule,), cost, rule if refused else None)
            if refused and self._notify is not None:
                detail = f"{identity.endpoint or identity.task}: rule {rule.id} would have refused"
                self._notify(Event(name="would_refuse", key=identity.client, detail=detail))

    def _count(self, identity: Identity, rules: Sequence[Rule], cost: float, refused_by: Rule | None) -> None:
        if self.demand is not None:
            self.demand.count(identity, rules, cost, refused_by=refused_by)
        if refused_by is not None and not refused_by.shadow and self._notify is not None:
            detail = f"{identity.endpoint or identity.task}: rule {refused_by.id}"
            self._notify(Event(name="rate_limited", key=identity.client, detail=detail))

    def _down(self, identity: Identity, why: str, version: int = 0) -> Decision:
        self.store_down_total.add()
        if not self._is_down:  # an event an outage, not one a call
            self._is_down = True
            if self._notify is not None:
                self._notify(Event(name="permits_down", detail=f"limits: {why}; on_store_down={self.on_store_down!r}"))
        allowed = self.on_store_down == "allow"
        return Decision(
            allowed=allowed,
            identity=identity,
            retry_after=0.0 if allowed else RETRY_DOWN,
            store_down=True,
            version=version,
        )

    # -- waiting in line ----------------------------------------------------------------------------------------------

    def enter(self, identity: Identity, cost: float = 1.0, *, max_wait: float = 0.0, name: str = "") -> Decision:
        """Decide; where a rule that queues refuses, wait for the booked slot if it is within *max_wait* seconds.

        In a task's run a slot that is further away stays booked, under *name*: the run comes back for it.
        """
        turn = Turn.begin(name, max_wait)
        decision = self.check(identity, cost, book=turn.books, booked=turn.booked)
        while (wait := self._wait(decision, turn, self._unbook)) is not None:
            time.sleep(wait)
            decision = self.check(identity, cost, book=True, booked=True)
        turn.end(decision)
        return decision

    async def aenter(self, identity: Identity, cost: float = 1.0, *, max_wait: float = 0.0, name: str = "") -> Decision:
        """The same for a coroutine. The event loop never waits for the store, and nobody longer than ``timeout`` from
        when a thread asks it. Past `QUEUE` who wait, it is refused."""
        turn = Turn.begin(name, max_wait)
        decision = await self._acheck(identity, cost, book=turn.books, booked=turn.booked)
        while (wait := self._wait(decision, turn, self._unbook_aside)) is not None:
            try:
                await asyncio.sleep(wait)
            except asyncio.CancelledError:
                self._unbook_aside(decision.limit, decision.slot_at)
                raise
            decision = await self._acheck(identity, cost, book=True, booked=True)
        turn.end(decision)
        return decision

    def permit(self, identity: Identity, cost: float = 1.0, *, max_wait: float = 0.0, name: str = "") -> Decision:
        """As `enter`; raises RateLimitedError where the call is refused. In a ReliableTask that defers the task."""
        name = name or identity.endpoint or identity.task
        decision = self.enter(identity, cost, max_wait=max_wait, name=name)
        if not decision.allowed:
            raise refusal(decision, name)
        return decision

    def _wait(self, decision: Decision, turn: Turn, unbook: Callable[[str, float | None], None]) -> float | None:
        if decision.allowed or decision.slot_in is None:
            return None
        if decision.slot_in <= turn.until - time.monotonic():
            return decision.slot_in
        if not turn.comes_back:
            unbook(decision.limit, decision.slot_at)
        return None

    def _unbook(self, name: str, slot_at: float | None) -> None:
        if slot_at is None:
            return
        try:
            self.permits.unbook(name, slot_at)
        except StoreError:
            return  # a slot that nobody uses delays the others by one interval

    def _unbook_aside(self, name: str, slot_at: float | None) -> None:
        self._threads.begin(partial(self._unbook, name, slot_at), always=True)

    def _forgo(self, late: Decision) -> None:
        """Nobody waits for this decision any more."""
        self._unbook(late.limit, late.slot_at)

    async def _acheck(self, identity: Identity, cost: float, *, book: bool, booked: bool) -> Decision:
        if self._in_process:
            return self.check(identity, cost, book=book, booked=booked)
        known = self._at_once(identity, cost, book=book, booked=booked)
        if known is not None:
            return known
        errand = Errand(partial(self.check, identity, cost, book=book, booked=booked), self._forgo)
        asked = self._threads.begin(errand, always=booked)  # who has waited for its slot is not sent away
        if asked is None:
            self.crowded_total.add()
            return Decision(allowed=False, identity=identity, retry_after=RETRY_DOWN, crowded=True)
        answer, left = asyncio.wrap_future(asked), self.timeout
        try:
            while left > 0:
                await asyncio.wait((answer,), timeout=left)
                if asked.done():
                    return await answer
                left = self.timeout if errand.began is None else errand.began + self.timeout - time.monotonic()
        except asyncio.CancelledError:
            asked.cancel()  # where no thread has taken it up it takes nothing
            answer.cancel()
            if errand.leave():
                self._threads.begin(errand.undo, always=True)
            raise
        if errand.leave():
            return await answer
        answer.cancel()
        return self._down(identity, f"no answer within {self.timeout:g} s")

    def _at_once(self, identity: Identity, cost: float, *, book: bool, booked: bool) -> Decision | None:
        """What the event loop can answer by itself."""
        rules = self.rules.rules()
        if rules is None:
            return None
        plan = self._plan(rules, identity, cost)
        if plan.shadows:
            return None
        known = self._known(rules, plan, identity, cost, asks=(book and plan.queues) or booked)
        if known is None and self.permits.outage.left > 0:
            return self._down(identity, self.permits.outage.reason, rules.version)
        return known


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is asked for one caller and cost, as long as the rules are the same."""

    holding: tuple[Rule, ...]
    shadows: tuple[Rule, ...]
    asks: dict[str, tuple[Rule, RateAsk]]
    rates: tuple[RateAsk, ...]
    ask: Ask
    queues: bool
    never: bool

    @classmethod
    def of(cls, matched: Sequence[Rule], identity: Identity, cost: float) -> _Plan:
        holding = tuple(rule for rule in matched if not rule.shadow)
        asks = {ask.name: (rule, ask) for rule in holding for ask in rule.asks(identity, cost)}
        rates = tuple(ask for _, ask in asks.values())
        return cls(
            holding=holding,
            shadows=tuple(rule for rule in matched if rule.shadow),
            asks=asks,
            rates=rates,
            ask=Ask(rates=rates),
            queues=any(rule.over_limit == "queue" for rule in holding),
            never=any(cost > ask.policy.most for ask in rates),
        )


def _standings(plan: _Plan, views: Sequence[RateView]) -> tuple[Standing, ...]:
    asks = plan.asks
    return tuple([Standing(asks[view.name][0], asks[view.name][1].policy, view) for view in views])
