"""The guard of one downstream: circuit, rates and bulkhead, decided together before a call, and settled after it.

What the process knows already is asked first (an open circuit, a refusal that still holds, a place of its own), then
the store, once. When the store does not answer, the declared policy decides and nobody waits again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal

from taskguard.clock import seconds
from taskguard.downstream import timeouts
from taskguard.downstream.admittance import (
    Await,
    Call,
    Do,
    Pass,
    Question,
    Rest,
    Steps,
    booked_for,
    booking,
    by_thread,
    covering,
    patience,
    undo_permit,
)
from taskguard.downstream.asking import Asker, again, known, wait_for
from taskguard.downstream.circuit import Circuit
from taskguard.downstream.desk import Desk
from taskguard.downstream.leasing import Leases
from taskguard.downstream.refusals import Refuser, Tallies
from taskguard.downstream.settling import Settler
from taskguard.downstream.slots import LocalSlots
from taskguard.errors import StoreError
from taskguard.events import Event
from taskguard.limits.adaptive import Tuner
from taskguard.permits import Answer, Ask, CircuitAsk, Permit, ProbeOutcome, Refusal, Slot, SlotAsk
from taskguard.policies.adaptive import Adaptive
from taskguard.policies.calls import Concurrency, Limit
from taskguard.policies.circuit import CircuitBreaker

OnStoreDown = Literal["allow", "refuse"]

_NEVER_TRIPS = CircuitBreaker(failure_rate_threshold=1.0, minimum_calls=1_000_000_000)
"""Of a downstream without a circuit: it can be paused, and nothing else."""


class Guard:
    """Lets calls in and settles them. For any number of threads and tasks."""

    def __init__(
        self,
        name: str,
        *,
        limits: tuple[Limit, ...],
        concurrency: Concurrency | None,
        breaker: CircuitBreaker | None,
        on_store_down: OnStoreDown,
        max_wait: float,
        shadow: bool,
        desk: Callable[[], Desk],
        leased: bool = False,
    ) -> None:
        self.name, self.limits, self.concurrency = name, limits, concurrency
        self.on_store_down, self.shadow = on_store_down, shadow
        self.tallies = Tallies()
        self.desk = desk
        self.slots = None if concurrency is None or not concurrency.local else LocalSlots(concurrency.limit)
        self.lease = 0.0 if concurrency is None else seconds(concurrency.lease)
        self._fleet_slots = concurrency if self.slots is None else None
        self._leases = Leases() if leased else None
        self._asks_store = bool(limits) or self._fleet_slots is not None
        self._rate_wait = max_wait
        self._slot_wait = max_wait if concurrency is None else max(max_wait, seconds(concurrency.max_wait))
        self._never_waits = self.slots is None and self._rate_wait == 0 and self._slot_wait == 0
        self.declared = breaker is not None
        self.circuit = Circuit(name, breaker or _NEVER_TRIPS, desk) if breaker or limits or self._fleet_slots else None
        self._refuser = Refuser(name, tallies=self.tallies, shadow=shadow, desk=desk)
        self._tuners = {
            each.name: Tuner(each.name, each.policy) for each in limits if isinstance(each.policy, Adaptive)
        }
        self._asker = Asker(name, limits, self._tuners)
        self._settler = Settler(
            name,
            circuit=self.circuit,
            declared=self.declared,
            slots=self.slots,
            lease=self.lease,
            tuners=self._tuners,
            tallies=self.tallies,
            desk=desk,
        )
        self.leave, self.ended, self.pause = self._settler.leave, self._settler.ended, self._settler.pause

    @property
    def rests_at_once(self) -> bool:
        """Whether a refusal by the store is the last word for whoever books a slot and does not wait."""
        return self._never_waits and not self.shadow

    def asks_first(self, cost: float) -> bool:
        """Whether a call of this cost begins with a question to the store: no place, lease or refusal of this process
        comes before it."""
        circuit = self.circuit
        if self.slots is not None or self._leases is not None or not self._asks_store or self.name in covering.get():
            return False
        if circuit is not None and circuit.asleep:
            circuit.awaken()
        if circuit is not None and circuit.refused_for() is not None:
            return False
        return all(isinstance(each.policy, Adaptive) or cost <= each.policy.most for each in self.limits)

    # -- in ---------------------------------------------------------------------------------------------------------

    def at_once(self, cost: float) -> Pass | None:
        """Let a call in, or raise Refused, without steps; None: it needs those of `enter`, which can wait and book."""
        if self.name in covering.get():
            return None
        circuit = self.circuit
        span = None if circuit is None else circuit.span
        if circuit is not None and span is None:
            return None
        timeouts.check(self.name)
        if self._asks_store:
            return self._straight(cost)
        slots = self.slots
        if slots is not None and not slots.take():
            return None
        passed = Pass(span=span)
        passed.local = slots is not None
        return passed

    def _straight(self, cost: float) -> Pass | None:
        """One question and its answer, of a call that neither waits nor books: all that most calls need."""
        if self._leases is not None or not self._never_waits or booking.get() or self.name in booked_for.get():
            return None
        rates = self._asker.alike(cost)
        desk = self.desk()
        if rates is None or (len(desk.denials) and any(desk.denials.left(rate.name, cost) for rate in rates)):
            return None
        circuit, holder = self.circuit, desk.holder()
        passed = Pass(cost=cost, span=None if circuit is None else circuit.span)
        passed.holder = holder
        ask = Ask(
            rates=rates,
            slot=None if self._fleet_slots is None else SlotAsk(self.name, self._fleet_slots.limit, holder, self.lease),
            circuit=CircuitAsk(self.name, circuit.policy, holder) if circuit is not None and self.declared else None,
            release=desk.returned(),
        )
        if rates:
            self.tallies.asked.add()
        asked_at = desk.clock()
        try:
            answer = desk.admit(ask)
        except StoreError as exc:
            self._store_is_down(desk, exc)
            return passed
        if not self._take(answer, ask, passed, desk, asked_at):
            assert isinstance(answer, Refusal)
            by_thread(self._refused(answer, ask, desk))
        passed.began = time.monotonic()
        return passed

    def enter(self, call: Call) -> Steps[Pass]:
        """Let the call in, or raise Refused; DownstreamTimeout where no time is left for it."""
        timeouts.check(self.name)
        around = covering.get().get(self.name)
        if around is not None and (around.left or around.block.left):
            around = None
        circuit = self.circuit if around is None or not around.block.probe else None
        if circuit is not None:
            if circuit.asleep:
                yield Do(circuit.awaken, in_process=self.desk().in_process)
            left = circuit.refused_for()
            if left is not None:
                self._refuser.by_circuit(circuit, None if left == math.inf else left)
                return Pass()
        if around is not None and (self.concurrency is None or around.lend()):
            passed = yield from self._inside(around, call, circuit)
            return passed
        if self.slots is not None and not (yield from self._place(self.slots)):
            return Pass()
        try:
            passed = yield from self._permit(call, circuit)
        except BaseException:
            if self.slots is not None:
                self.slots.release()
            raise
        passed.local = self.slots is not None
        if around is not None and not passed.probe:
            passed.around = around.block
        passed.began = time.monotonic()
        return passed

    def pay(self, passed: Pass, call: Call) -> Steps[None]:
        """Take the rates' permits for a further try of a call that was let in. Raises Refused."""
        circuit = self.circuit
        left = None if circuit is None else circuit.refused_for()
        if left is not None and circuit is not None:
            self._refuser.by_circuit(circuit, None if left == math.inf else left)
        if self.limits:
            yield from self._ask(call, self._asker.ask(call), Pass())
        passed.unspent[:] = [call.cost]

    def _inside(self, around: Pass, call: Call, circuit: Circuit | None) -> Steps[Pass]:
        """A call in a block of this downstream, or in a call there: it has that one's place, and the block's permits
        once. Where the block is a probe, there is no *circuit* to ask."""
        block = around.block
        passed = Pass(span=None if circuit is None else circuit.span)
        passed.lender = around if self.concurrency is not None else None
        asks = circuit is not None and self.declared and circuit.span is None
        paid = bool(self.limits) and block.spend(call.cost)
        try:
            if asks or (self.limits and not paid):
                passed.holder = self.desk().holder()
                probing = CircuitAsk(self.name, circuit.policy, passed.holder) if asks and circuit is not None else None
                yield from self._ask(call, self._asker.ask(call, circuit=probing, paid=paid), passed)
        except BaseException:
            if paid:
                block.unspent.append(call.cost)
            if passed.lender is not None:
                passed.lender.take_back()
            raise
        passed.around = None if passed.probe else block
        passed.began = time.monotonic()
        return passed

    def _place(self, slots: LocalSlots) -> Steps[bool]:
        """Take a local place; False where there is none and only a shadow is cast."""
        if slots.take():
            return True
        wait = patience(self._slot_wait)
        if wait > 0:
            place = slots.ask()
            try:
                came = yield Await(place, wait)
            except BaseException:
                if not slots.withdraw(place):
                    slots.release()
                raise
            if came or not slots.withdraw(place):
                return True
        self._refuser.by_place(slots.limit, slots.turn())
        return False

    def _permit(self, call: Call, circuit: Circuit | None) -> Steps[Pass]:
        passed = Pass(cost=call.cost, span=None if circuit is None else circuit.span)
        if not self._asks_store and not call.also and (circuit is None or circuit.span is not None):
            return passed
        holder = self.desk().holder()
        slot = None
        if self._fleet_slots is not None:
            slot = SlotAsk(self.name, self._fleet_slots.limit, holder, self.lease)
        with_circuit = circuit is not None and (self.declared or circuit.span is None)
        ask = CircuitAsk(self.name, circuit.policy, holder) if circuit is not None and with_circuit else None
        passed.holder = holder
        yield from self._ask(call, self._asker.ask(call, slot=slot, circuit=ask), passed)
        return passed

    def _ask(self, call: Call, ask: Ask, passed: Pass) -> Steps[None]:
        """Ask until there is a permit, a refusal that holds, or no time to wait any longer."""
        desk = self.desk()
        if self._leases is not None and ask.rates:
            yield from self._spend(self._leases, ask, desk)
            ask = Ask(slot=ask.slot, circuit=ask.circuit, book=ask.book, booked=ask.booked)
            if ask.slot is None and ask.circuit is None:
                return
        slot = None if ask.slot is None else Slot(ask.slot.name, ask.slot.holder)
        began = desk.clock()
        rate_until = began + patience(self._rate_wait)
        slot_until = began + patience(self._slot_wait)
        if ask.rates:
            self.tallies.asked.add()
        if ask.booked:
            booked_for.set(booked_for.get() - {self.name})
        while True:
            asked_at = desk.clock()
            answer = known(desk, ask)
            if answer is None:
                try:
                    undo = undo_permit(desk.store.release, slot, desk.unbook, partial(self._no_probe, desk, ask))
                    answer = yield Question(desk, ask, undo)
                except StoreError as exc:
                    self._store_is_down(desk, exc)
                    return
            if self._take(answer, ask, passed, desk, asked_at):
                return
            assert isinstance(answer, Refusal)
            now = desk.clock()
            wait = wait_for(answer, now, rate_until=rate_until, slot_until=slot_until)
            if wait is None:
                yield from self._refused(answer, ask, desk)
                return
            if answer.by == "rate" and answer.slot_in is None and not ask.book:
                ask = again(ask, book=True)
                continue
            if now + wait >= slot_until:
                slot_until = -math.inf  # one look more
            yield Rest(wait)
            # Booking again: who misses its slot is told the next one in the same answer.
            ask = again(ask, book=ask.book, booked=ask.booked or answer.slot_in is not None)

    def _spend(self, leases: Leases, ask: Ask, desk: Desk) -> Steps[None]:
        """Take the rates' permits from this process's leases. What is refused is not booked: a lease knows no line."""
        self.tallies.asked.add()
        try:
            refusal = yield from leases.spend(ask.rates, desk, until=desk.clock() + patience(self._rate_wait))
        except StoreError as exc:
            self._store_is_down(desk, exc)
            return
        if refusal is None:
            return
        if booking.get() and refusal.retry_after is not None:
            rate = next(rate for rate in ask.rates if rate.name == refusal.name)
            refusal = replace(refusal, retry_after=leases.turn(rate, refusal.retry_after, desk))
        yield from self._refused(refusal, Ask(rates=leases.as_lent(ask.rates, desk)), desk)

    def _take(self, answer: Answer, ask: Ask, passed: Pass, desk: Desk, asked_at: float) -> bool:
        """Learn from the answer, and take what it permits. False where it refuses."""
        circuit = self.circuit
        if answer.circuit is not None and circuit is not None:
            if answer.circuit.generation != circuit.view.generation or circuit.span is None:
                left = answer.retry_after if isinstance(answer, Refusal) and answer.by == "circuit" else None
                circuit.apply(answer.circuit, asked_at=asked_at, left=left)
            passed.span = circuit.span
        if isinstance(answer, Refusal):
            return False
        if answer.probe and answer.circuit is not None:
            passed.probe, passed.generation, passed.span = True, answer.circuit.generation, None
            if circuit is not None:
                circuit.probing(passed.holder, passed.generation)
        if ask.slot is not None:
            passed.slot = Slot(ask.slot.name, ask.slot.holder)
            self.tallies.held.add()
            desk.held(passed.slot, lease=self.lease, lost=self._lost)
        if self._tuners:
            for view in answer.rates:
                self._tuned(view.name, view.limit)
        return True

    def _no_probe(self, desk: Desk, ask: Ask, permit: Permit) -> None:
        """Who was to probe is gone: the next one may. Told by another thread."""
        if self.circuit is not None and ask.circuit is not None and permit.circuit is not None:
            probe = ProbeOutcome(ask.circuit.holder, "ignored")
            desk.soon(partial(self.circuit.tell, probe=probe, generation=permit.circuit.generation))

    def _refused(self, refusal: Refusal, ask: Ask, desk: Desk) -> Steps[None]:
        if refusal.by == "circuit":
            assert self.circuit is not None
            self.circuit.refused(refusal.retry_after)
            self._refuser.by_circuit(self.circuit, refusal.retry_after)
            return
        keeps = booking.get()
        if refusal.slot_in is not None and not keeps:  # booked to wait for, and too far away
            slot_in = refusal.slot_in
            with suppress(StoreError):  # an unused slot delays nobody longer than itself
                yield Do(lambda: desk.unbook(refusal.name, slot_in), None, desk.in_process)
        slot_at = None
        if refusal.slot_in is not None and keeps:  # a store is asked for it, so its own clock says when
            slot_at = (yield Do(desk.now, None, desk.in_process)) + refusal.slot_in
        self._refuser.by_store(refusal, ask, slot_at=slot_at)

    def _store_is_down(self, desk: Desk, exc: StoreError) -> None:
        self.tallies.store_down.add()
        if self.on_store_down == "refuse":
            self._refuser.by_outage(str(exc), max(0.1, desk.store.outage.left))

    def _lost(self, slot: Slot) -> None:
        self.tallies.slots_lost.add()
        self.desk().notify(
            Event(name="slot_lost", key=self.name, detail=f"place {slot.holder}: its lease ended while the call ran")
        )

    # -- how it stands ---------------------------------------------------------------------------------------------

    def active(self) -> int:
        """Places that calls of this process hold."""
        return (
            self.slots.active if self.slots is not None else self.tallies.held.total() - self.tallies.given_back.total()
        )

    def tuned(self, name: str) -> float:
        """Where the adaptive limit stands, as this process knows it."""
        return self._tuners[name].limit

    def why_tuned(self, name: str) -> str:
        """Why the adaptive limit stands where it does."""
        return self._tuners[name].why

    def _tuned(self, name: str, limit: float) -> None:
        tuner = self._tuners.get(name)
        if tuner is not None:
            tuner.limit = limit
