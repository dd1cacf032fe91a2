"""The probes a process has under way: their leases are renewed, and how they ended is told until the store knows.

A probe whose end is not known holds up the whole fleet until its lease is over. So a call that outlasts its lease keeps
it, for `RENEWED` leases at most: one that hangs for good gives way then. An end that the store did not hear is told
again until the lease ends.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from taskguard.clock import seconds
from taskguard.downstream.desk import Desk
from taskguard.errors import StoreError
from taskguard.permits import Ask, CircuitAsk, CircuitView, Outcomes, Permit, ProbeOutcome
from taskguard.policies.circuit import CircuitBreaker

RENEWED = 10
"""Leases for which a probe under way keeps its place."""


@dataclass(slots=True)
class _Probe:
    generation: int
    began: float
    renewed: float
    untold: ProbeOutcome | None = None


class Probes:
    """Those of one circuit. For any number of threads. Instants are those of the desk's clock."""

    def __init__(self, name: str, policy: CircuitBreaker) -> None:
        self.name, self.policy = name, policy
        self.lease = seconds(policy.probe_lease)
        self._probes: dict[str, _Probe] = {}
        self._lock = threading.Lock()  # a lease renewed behind its probe's end would hold up the fleet

    def __len__(self) -> int:
        return len(self._probes)

    def began(self, holder: str, generation: int, now: float) -> None:
        """The store has let *holder* through as a probe of *generation*."""
        self._probes[holder] = _Probe(generation, now, now)

    def ended(self, desk: Desk, probe: ProbeOutcome, generation: int) -> CircuitView | None:
        """Tell how a probe ended. One round trip. None: the store did not answer; `tend` tells it again."""
        with self._lock:
            now = desk.clock()
            known = self._probes.setdefault(probe.holder, _Probe(generation, now, now))
            known.untold = probe
            try:
                view = desk.store.report(self.name, self.policy, Outcomes(generation), probe)
            except StoreError:
                return None
            del self._probes[probe.holder]
            return view

    def tend(self, desk: Desk) -> CircuitView | None:
        """Renew the leases that need it, and tell the ends that were not heard. What the store said last of the
        circuit; None: nothing."""
        view = None
        for holder, probe in list(self._probes.items()):
            if probe.untold is None:
                self._renew(desk, holder, probe)
            elif desk.clock() - probe.renewed >= self.lease:
                self._probes.pop(holder, None)
            else:
                view = self.ended(desk, probe.untold, probe.generation) or view
        return view

    def _renew(self, desk: Desk, holder: str, probe: _Probe) -> None:
        now = desk.clock()
        if now - probe.renewed < self.lease / 3 or now - probe.began > RENEWED * self.lease:
            return
        with self._lock:
            if self._probes.get(holder) is not probe or probe.untold is not None:
                return
            try:
                if desk.store.circuit(self.name).generation != probe.generation:
                    del self._probes[holder]
                    return
                answer = desk.store.admit(Ask(circuit=CircuitAsk(self.name, self.policy, holder)))
                if not isinstance(answer, Permit) or answer.circuit is None or not answer.probe:
                    return
                if answer.circuit.generation != probe.generation:  # it has tripped in between, and waited
                    other = Outcomes(answer.circuit.generation)
                    desk.store.report(self.name, self.policy, other, ProbeOutcome(holder, "ignored"))
                    return
            except StoreError:
                return
            probe.renewed = now
