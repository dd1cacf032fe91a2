"""The circuit as pure functions: what asking, outcomes, probes and an operator's word make of it.

Units are those of `limits`. Every change of state makes a new generation; outcomes carry the generation their calls
began in, and those of another say nothing, so that a call which began before the trip cannot close what it tripped.
A pause that the downstream asked for is no trip: its window goes on, so that who always asks to wait trips as well.
A probe is a lease: when it ends another goes, and what the first says after all still counts, once. Time alone changes
nothing that is kept: an open circuit becomes half-open when somebody asks after its wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, fmod
from typing import NamedTuple

from taskguard.clock import from_us, seconds, span_us
from taskguard.limits.rates import SINCE_1970, SKEW
from taskguard.permits import CircuitView, Outcomes, ProbeOutcome
from taskguard.policies.circuit import CircuitBreaker, CircuitState

FORCED = ("forced_open", "forced_closed", "disabled")
BUCKETS = 10
"""Parts of a window: how finely it moves."""
KEPT = 86400e6
"""Microseconds for which a generation is remembered after the last word about its circuit."""
PAUSED = "retry-after"
"""Who forces a circuit open because the downstream asked to be left alone."""
LATE = 10.0
"""Leases after its own for which a probe may still say how it ended."""
NEVER = 2.0
"""A share that is never reached."""


Part = tuple[float, int, int, int]


class Terms(NamedTuple):
    """A breaker in numbers, in the order in which Lua gets them. ``window`` is microseconds, or calls if counted."""

    failure_rate: float
    slow_rate: float
    minimum_calls: float
    counted: bool
    window: float
    wait: float
    backoff: float
    max_wait: float
    probes: float
    successes: float
    probe_lease: float


class Circuit(NamedTuple):
    """A circuit as it rests. ``until``: 0.0 for none. ``probes``: lease end by holder. ``window``: parts of
    (began, calls, failures, slow). ``span``: microseconds the window reaches back; 0.0: it counts calls. ``kept``: how
    many generations before this one the window counts too: those that a pause has ended."""

    state: CircuitState = "closed"
    generation: int = 0
    until: float = 0.0
    trips: int = 0
    closed_at: float = 0.0
    successes: int = 0
    probes: dict[str, float] = {}  # noqa: RUF012  # never changed in place
    span: float = 0.0
    window: tuple[Part, ...] = ()
    who: str = ""
    why: str = ""
    kept: int = 0

    @property
    def paused(self) -> bool:
        """Whether the downstream asked to be left alone."""
        return self.state == "forced_open" and self.who == PAUSED

    def going_on(self, state: CircuitState, *, until: float = 0.0, why: str = "", who: str = "") -> Circuit:
        """The next generation of a pause, or of its end: the window goes on, and what began before it counts."""
        return self._replace(
            state=state, generation=self.generation + 1, until=until, who=who, why=why, kept=self.kept + 1
        )

    def following(
        self, state: CircuitState, *, until: float = 0.0, trips: int = 0, why: str = "", who: str = ""
    ) -> Circuit:
        """The next generation; its window and probes are empty."""
        return Circuit(
            state, self.generation + 1, until, trips, closed_at=self.closed_at, span=self.span, who=who, why=why
        )


class Asked(NamedTuple):
    """wait: 0.0 lets the call through, None: no waiting helps. changed: None where nothing is to be written."""

    wait: float | None
    changed: Circuit | None = None
    probe: bool = False


def terms_of(policy: CircuitBreaker) -> Terms:
    """The numbers of a declaration."""
    counted = policy.window == "count"
    size = float(seconds(policy.window_size))
    return Terms(
        failure_rate=policy.failure_rate_threshold,
        slow_rate=NEVER if policy.slow_call_rate_threshold is None else policy.slow_call_rate_threshold,
        minimum_calls=float(policy.minimum_calls),
        counted=counted,
        window=size if counted else span_us(size),
        wait=span_us(seconds(policy.wait_in_open)),
        backoff=policy.backoff,
        max_wait=span_us(seconds(policy.max_wait_in_open)),
        probes=float(policy.probes_in_half_open),
        successes=float(policy.success_threshold),
        probe_lease=span_us(seconds(policy.probe_lease)),
    )


def ask(terms: Terms, circuit: Circuit, now: float, holder: str) -> Asked:
    """Whether a call may go. An open circuit past its wait becomes half-open, and gives *holder* the first probe."""
    circuit = current(circuit, now)
    match circuit.state:
        case "closed" | "forced_closed" | "disabled":
            return Asked(0.0)
        case "open" if circuit.until - now > terms.max_wait + SKEW:  # the clock was set back, or the policy changed
            return Asked(terms.max_wait, circuit._replace(until=now + terms.max_wait))
        case "open" | "forced_open" if circuit.until > now:
            return Asked(circuit.until - now)
        case "forced_open":
            return Asked(None)
        case "open":
            circuit = circuit.following("half_open", trips=circuit.trips, why="the first probe goes")
    oldest = now - LATE * terms.probe_lease
    probes = {name: end for name, end in circuit.probes.items() if end > oldest}
    under_way = [end for end in probes.values() if end > now]
    if probes.get(holder, 0.0) <= now and len(under_way) >= terms.probes:
        return Asked(min(under_way) - now)
    probes[holder] = max(probes.get(holder, 0.0), now + terms.probe_lease)
    return Asked(0.0, circuit._replace(probes=probes), probe=True)


def report(terms: Terms, circuit: Circuit, now: float, outcomes: Outcomes, probe: ProbeOutcome | None) -> Circuit:
    """The circuit after these calls and this probe."""
    circuit = current(circuit, now)
    if not 0 <= circuit.generation - outcomes.generation <= circuit.kept:
        return circuit
    if circuit.state == "half_open" and probe is not None:
        return _probed(terms, circuit, now, probe)
    if not (circuit.state == "closed" or circuit.paused) or outcomes.calls <= 0:
        return circuit
    circuit = _counted(terms, circuit, now, outcomes)
    calls, failures, slow = _sums(circuit, now)
    if calls < terms.minimum_calls:
        return circuit
    if failures / calls >= terms.failure_rate:
        return _opened(terms, circuit, now, f"{failures} of {calls} calls failed")
    if slow / calls >= terms.slow_rate:
        return _opened(terms, circuit, now, f"{slow} of {calls} calls were slow")
    return circuit


def force(circuit: Circuit, now: float, state: CircuitState, *, until: float, who: str, why: str) -> Circuit:
    """An operator's word: a forced state until an instant (0.0: for good), or "closed" to begin anew.

    A pause (forced open by `PAUSED`) yields to every other state, and to a longer pause.
    """
    circuit = current(circuit, now)
    if state == "forced_open" and who == PAUSED and until:
        if circuit.state == "closed" or (circuit.paused and circuit.until < until):
            return circuit.going_on(state, until=until, who=who, why=why)
        return circuit
    after = circuit.following(state, until=until, who=who, why=why)
    return after._replace(closed_at=now) if state == "closed" and circuit.state != "closed" else after


def current(circuit: Circuit, now: float) -> Circuit:
    """The circuit without a forced state that is over."""
    if circuit.state not in FORCED or not 0.0 < circuit.until <= now:
        return circuit
    follows = circuit.going_on if circuit.paused else circuit.following
    after = follows("closed", why=f"{circuit.state} is over")
    return after._replace(closed_at=circuit.until) if circuit.state == "forced_open" else after


def view(name: str, circuit: Circuit, now: float) -> CircuitView:
    """The circuit for those who look."""
    circuit = current(circuit, now)
    calls, failures, slow = _sums(circuit, now)
    return CircuitView(
        name=name,
        state=circuit.state,
        generation=circuit.generation,
        until=from_us(circuit.until) if circuit.until else None,
        calls=calls,
        failures=failures,
        slow=slow,
        trips=circuit.trips,
        closed_at=from_us(circuit.closed_at) if circuit.closed_at else 0.0,
        who=circuit.who,
        why=circuit.why,
    )


def until(circuit: Circuit, now: float) -> float | None:
    """When the circuit may be forgotten; None: never, because an operator forced it for good."""
    if circuit.state in FORCED and not circuit.until:
        return None
    return max([now, circuit.until, *circuit.probes.values()]) + max(KEPT, circuit.span)


def _probed(terms: Terms, circuit: Circuit, now: float, probe: ProbeOutcome) -> Circuit:
    if probe.holder not in circuit.probes:  # told already, or never sent
        return circuit
    match probe.outcome:
        case "failure":
            return _opened(terms, circuit, now, "a probe failed")
        case "success" if circuit.successes + 1 >= terms.successes:
            return circuit.following("closed", why="the probes succeeded")._replace(closed_at=now)
    left = {name: end for name, end in circuit.probes.items() if name != probe.holder}
    return circuit._replace(probes=left, successes=circuit.successes + (probe.outcome == "success"))


def _opened(terms: Terms, circuit: Circuit, now: float, why: str) -> Circuit:
    wait = terms.wait
    for _ in range(circuit.trips):
        if wait >= terms.max_wait:
            break
        wait *= terms.backoff
    wait = max(wait, circuit.until - now)  # it asked for a longer pause
    until = now + ceil(min(wait, terms.max_wait))
    return circuit.following("open", until=until, trips=circuit.trips + 1, why=why)


def _counted(terms: Terms, circuit: Circuit, now: float, outcomes: Outcomes) -> Circuit:
    """The circuit with these calls in its window, in the last part of it if they belong there."""
    calls, failures, slow = outcomes.calls, outcomes.failures, outcomes.slow
    window = list(circuit.window)
    last = window[-1] if window else (0.0, 0, 0, 0)
    if terms.counted:
        span, began = 0.0, now
        joins = bool(window) and last[1] + calls <= floor(terms.window / BUCKETS)
    else:
        part = max(floor(terms.window / BUCKETS), 1.0)
        span, began = terms.window, now - fmod(now + SINCE_1970, part)
        joins = bool(window) and last[0] >= began  # later: by the skew of another process's clock
    if joins:
        window[-1] = (last[0], last[1] + calls, last[2] + failures, last[3] + slow)
    else:
        window.append((began, calls, failures, slow))
    if terms.counted:
        total = sum(part[1] for part in window)
        while total - window[0][1] >= terms.window:
            total -= window.pop(0)[1]
    else:
        window = _within(window, now, span)
    return circuit._replace(span=span, window=tuple((at, n, bad, late) for at, n, bad, late in window))


def _sums(circuit: Circuit, now: float) -> tuple[int, int, int]:
    parts = _within(circuit.window, now, circuit.span)
    return sum(part[1] for part in parts), sum(part[2] for part in parts), sum(part[3] for part in parts)


def _within(window: Sequence[Part], now: float, span: float) -> list[Part]:
    """The parts that count now; one that lies ahead is of a clock that was set back."""
    return [part for part in window if not span or now - span < part[0] <= now + SKEW]
