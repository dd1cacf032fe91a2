"""How one call is settled: its place is given back, its circuit and its adaptive limits learn how it ended.

A downstream that asked to be left alone is, by the whole fleet: its circuit is forced open for as long as it asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from taskguard.clock import wall_clock
from taskguard.downstream.admittance import Pass
from taskguard.downstream.answers import of_error
from taskguard.downstream.circuit import Circuit, Verdict, judge
from taskguard.downstream.desk import Desk
from taskguard.downstream.refusals import ASKED_TO_WAIT, Tallies
from taskguard.downstream.slots import LocalSlots
from taskguard.downstream.spans import Span
from taskguard.errors import DownstreamTimeout, StoreError
from taskguard.events import Event
from taskguard.limits.adaptive import Tuner
from taskguard.permits import ProbeOutcome

PAUSED_ALREADY = 0.5
"""Seconds by which a pause must be longer than the one that holds: the callers of one answer are told alike."""


class Settler:
    """Settles the calls to one downstream."""

    def __init__(
        self,
        name: str,
        *,
        circuit: Circuit | None,
        declared: bool,
        slots: LocalSlots | None,
        lease: float,
        tuners: Mapping[str, Tuner],
        tallies: Tallies,
        desk: Callable[[], Desk],
    ) -> None:
        self.name, self.circuit, self.declared = name, circuit, declared
        self.slots, self.lease, self.tallies, self.desk = slots, lease, tallies, desk
        self._tuners = tuners

    def leave(self, passed: Pass, exc: BaseException | None) -> Callable[[], None] | None:
        """Settle the call, once. What it gives must be called: it tells the store, in one round trip."""
        if passed.left:
            return None
        passed.left = True
        elapsed = time.monotonic() - passed.began
        if passed.around is None:
            self.tallies.durations.add(elapsed)
        if passed.lender is not None:
            passed.lender.behind += passed.behind
        self._give_back(passed, elapsed)
        told = self._judged(passed, exc, elapsed)
        wait = self._adapted(passed, exc, elapsed)
        if wait is None:
            return told

        def tell() -> None:
            if told is not None:
                told()
            self.pause(wait, why=f"it asked to wait {wait:g} s")

        return tell

    def _give_back(self, passed: Pass, held: float) -> None:
        """Give the place back, once the last thread that was left behind with it has ended."""
        began = time.monotonic() - held
        running = next((thread for thread in passed.behind if not thread.done()), None)
        if running is not None:
            running.add_done_callback(lambda _: self._give_back(passed, time.monotonic() - began))
            return
        if passed.local and self.slots is not None:
            self.slots.release(held)
        if passed.slot is not None:
            self.tallies.given_back.add()
            self.desk().release(passed.slot, lease=self.lease)
        if passed.lender is not None:
            passed.lender.take_back()

    def ended(self, circuit: Circuit, span: Span, exc: BaseException | None, slow: bool) -> None:
        """A call that passed a closed circuit, and nothing else, has failed or was slow."""
        circuit.ended(span, exc, slow=slow)
        answer = None if exc is None else of_error(exc, now=wall_clock())
        if answer is not None and answer.wait:
            self.pause(answer.wait, why=f"it asked to wait {answer.wait:g} s")

    def _judged(self, passed: Pass, exc: BaseException | None, elapsed: float) -> Callable[[], None] | None:
        circuit = self.circuit
        if circuit is None or not self.declared:
            return None
        verdict: Verdict = passed.verdict or ("success" if exc is None else judge(circuit.policy, exc))
        if passed.told:
            verdict = "ignored"
        if passed.late and verdict == "success":
            verdict = "failure"
        slow = circuit.slow_after is not None and elapsed >= circuit.slow_after
        if passed.around is not None:
            if verdict == "ignored":
                return None
            passed.around.told = True
            if passed.lender is not None and passed.lender is not passed.around:
                passed.lender.told = True
            if passed.around.probe:  # the block tells it when it ends, for the worst of its calls
                if passed.around.verdict != "failure":
                    passed.around.verdict, passed.around.told = verdict, False
                return None
        if passed.probe:
            outcome: Verdict = "failure" if slow and verdict == "success" else verdict
            circuit.note(None, outcome)
            probe = ProbeOutcome(passed.holder, outcome)
            return lambda: circuit.tell(probe=probe, generation=passed.generation)
        if circuit.note(passed.span, verdict, slow=slow):
            return lambda: circuit.tell(passed.span)
        return None

    def _adapted(self, passed: Pass, exc: BaseException | None, elapsed: float) -> float | None:
        """Seconds for which the downstream asked to be left alone; its adaptive limits learn of the call."""
        answer = passed.answer
        if answer is None and exc is not None:
            answer = of_error(exc, now=wall_clock())
        failed = isinstance(exc, DownstreamTimeout) or (passed.late and not passed.told)
        for tuner in self._tuners.values():
            tuner.saw(self.desk(), answer, elapsed, failed=failed)
        if answer is None or not answer.wait or (passed.around is not None and passed.around.answer is answer):
            return None
        return answer.wait

    def pause(self, wait: float, *, why: str) -> None:
        """Let no call of the fleet through for *wait* seconds. An operator's word, an open circuit and a longer wait
        stand."""
        circuit = self.circuit
        if circuit is None:
            return
        desk = self.desk()
        view = circuit.view
        until = desk.now() + wait
        paused = view.state == "forced_open" and view.who == ASKED_TO_WAIT
        if view.state != "closed" and not paused:  # the circuit's own waits, or an operator's
            return
        if paused and (view.until or 0.0) >= until - PAUSED_ALREADY:
            return
        asked_at = desk.clock()
        try:
            view = desk.store.force(circuit.name, "forced_open", until=until, who=ASKED_TO_WAIT, why=why)
        except StoreError:
            return
        circuit.apply(view, asked_at=asked_at)
        if view.who != ASKED_TO_WAIT:  # it has tripped meanwhile, or an operator has spoken
            return
        desk.notify(Event(name="downstream_paused", key=self.name, detail=f"{wait:g} s: {why}"))
