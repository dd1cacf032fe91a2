"""A process's view of a circuit that the fleet shares.

The closed path looks at one attribute and counts locally: no store, no lock. Its counts are told with the next failure,
and by the tending thread every tenth of the window, at most every second. A failure is told at once, because the
answer is how a trip is learned. Open, a call is refused here, without the store, until the first probe may go; then the
store gives the probes, so that the fleet sends exactly as many as are allowed.

A call counts for the generation it began in: each has its own `Span`, and what a late call adds to an old one is never
told. A process that is killed loses the successes of its last second; failures are in the store before they are raised.

::

            failure or slow rate over its threshold                      wait_in_open is over
    closed ────────────────────────────────────────► open ────────────────────────────────────► half_open
      ▲                                               ▲                                            │  │
      │                                               └────────── a probe failed: longer wait ─────┘  │
      └──────────────────────────── success_threshold probes succeeded ──────────────────────────────┘
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from taskguard.clock import seconds
from taskguard.downstream.desk import Desk
from taskguard.downstream.probing import Probes
from taskguard.downstream.spans import Span
from taskguard.downstream.tallies import Tally
from taskguard.downstream.tending import begins_anew, tending
from taskguard.errors import ConfigurationError, DownstreamTimeout, Refused, StoreError, TaskOutcome
from taskguard.events import Event
from taskguard.limits.breaker import PAUSED
from taskguard.permits import CircuitView, Outcomes, ProbeOutcome
from taskguard.policies.circuit import CircuitBreaker, CircuitChange, CircuitState

logger = logging.getLogger(__name__)

Verdict = Literal["success", "failure", "ignored"]
T = TypeVar("T")

_PASSES = ("closed", "forced_closed", "disabled")
_ASKED_AGAIN = 0.05
"""Seconds for which a refused probe is not asked for again: the circuit may close at any moment."""
_LOOKED_AFTER = 1.0
"""Seconds after which a circuit that is not closed is looked at, should nobody have told its change."""


Ended = Callable[["Circuit", "Span", BaseException | None, bool], None]


def judge(policy: CircuitBreaker, exc: BaseException) -> Verdict:
    """What *exc* says about the downstream.

    A failure is what is expected and not ignored, and every timeout. Another exception is an answer: a success. What
    ends the caller and not the call (SystemExit, a cancelled task, GeneratorExit, a soft time limit, a refusal, the
    outcome of a task) says nothing, unless ``expected`` names it by more than `Exception`. A mistake in the code that
    calls (ConfigurationError) never says anything.
    """
    if isinstance(exc, (*policy.ignored, ConfigurationError)):
        return "ignored"
    if isinstance(exc, _named(policy)):
        return "failure"
    if not isinstance(exc, Exception) or isinstance(exc, (Refused, TaskOutcome)):
        return "ignored"
    if isinstance(exc, DownstreamTimeout):
        return "failure"
    kinds = {cls.__name__ for cls in type(exc).__mro__}
    if "SoftTimeLimitExceeded" in kinds:
        return "ignored"
    if "TaskPredicate" in kinds:  # how a Celery task ends itself; a retry carries what it is for
        reason = getattr(exc, "exc", None)
        return judge(policy, reason) if isinstance(reason, Exception) else "ignored"
    return "failure" if isinstance(exc, policy.expected) else "success"


@functools.lru_cache(maxsize=256)
def _named(policy: CircuitBreaker) -> tuple[type[BaseException], ...]:
    return tuple(each for each in policy.expected if each not in (Exception, BaseException))


class Circuit:
    """The circuit *name*, seen from this process. For any number of threads; a forked child begins with no counts.

    span: what a call that begins now is counted in; None: look closer (`closer`).
    """

    def __init__(self, name: str, policy: CircuitBreaker, desk: Callable[[], Desk], *, label: str = "") -> None:
        self.name, self.policy = name, policy
        self.label = label or name
        self.slow_after = None if policy.slow_call_duration is None else seconds(policy.slow_call_duration)
        self.view = CircuitView(name=name)
        self.span: Span | None = None
        self._past = 0
        self.rejected, self.succeeded, self.failed = Tally(), Tally(), Tally()
        self._find_desk = desk
        self._told_every = min(1.0, seconds(policy.window_size) / 10 if policy.window == "time" else 1.0)
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """Look closer at the first call: threads are to be started, and the counts are the parent's."""
        self._lock = threading.Lock()
        self.span = None
        self._desk: Desk | None = None
        self._until = -math.inf
        self._applied_at = -math.inf
        self._known = False
        self._since = 0
        self._probes = Probes(self.name, self.policy)
        self.due_at = math.inf

    # -- before a call ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> CircuitState:
        """As this process knows it."""
        return self.view.state

    @property
    def asleep(self) -> bool:
        """Whether this process has not asked the store yet."""
        return self._desk is None

    def awaken(self) -> None:
        """Ask the store how the circuit stands, and listen from now on. One round trip; never raises."""
        desk = self._find_desk()
        asked_at = desk.clock()
        try:
            view = desk.store.circuit(self.name)
        except StoreError:
            view = CircuitView(name=self.name, generation=self.view.generation)
        self._desk = desk
        self.apply(view, asked_at=asked_at)
        if not self._known:
            self._known = True
            self.due_at = time.monotonic() + self._told_every
            desk.watch(self)
            tending.add(self)

    def sleep(self) -> None:
        """The application uses another store from now on."""
        self.view = CircuitView(name=self.name)
        self.after_fork()

    def refused_for(self) -> float | None:
        """Seconds for which no call of this process may go and the store need not be asked; inf: until it is told
        otherwise; None: the store decides, or the circuit is closed."""
        if self.span is not None or self._desk is None:
            return None
        left = self._until - self._desk.clock()
        return left if left > 0 else None

    def probing(self, holder: str, generation: int) -> None:
        """The store has let a call through as a probe: its lease is renewed until `tell` says how it ended."""
        if self._desk is not None:
            self._probes.began(holder, generation, self._desk.clock())
            self.due_at = min(self.due_at, time.monotonic() + self._probes.lease / 3)
            tending.wake()

    def refused(self, retry_after: float | None) -> None:
        """The store gave no probe."""
        if self._desk is not None and self.view.state == "half_open":
            wait = _ASKED_AGAIN if retry_after is None else min(retry_after, _ASKED_AGAIN)
            self._until = self._desk.clock() + wait

    # -- after a call -----------------------------------------------------------------------------------------------

    def note(self, span: Span | None, verdict: Verdict, *, slow: bool = False) -> bool:
        """Count a call that began in *span*. True where the store is to be told at once."""
        if verdict == "ignored":
            return False
        if verdict == "failure":
            self.failed.add()
        elif span is None:
            self.succeeded.add()
        if span is None or not span.counted:
            return False
        failed = verdict == "failure"
        span.add(failed=failed, slow=slow)
        return failed and (span is self.span or span.generation >= self._since)

    def tell(self, span: Span | None = None, *, probe: ProbeOutcome | None = None, generation: int = 0) -> None:
        """Tell the store what was counted, or how a probe of *generation* ended, and learn how the circuit stands.

        One round trip; never raises.
        """
        desk = self._desk
        if desk is None:
            return
        asked_at = desk.clock()
        if probe is not None:
            self._heard(self._probes.ended(desk, probe, generation), asked_at)
            return
        outcomes = Outcomes() if span is None else span.take()
        if not outcomes.calls:
            return
        try:
            view = desk.store.report(self.name, self.policy, outcomes, None)
        except StoreError:
            down = desk.store.outage.since
            if span is not None and (down is None or asked_at - down < seconds(self.policy.window_size)):
                span.put_back(outcomes)
            return
        self.apply(view, asked_at=asked_at)

    def _heard(self, view: CircuitView | None, asked_at: float) -> None:
        if view is not None:
            self.apply(view, asked_at=asked_at)

    def tend(self) -> None:
        """The tending thread's round: tell what was counted; look at a circuit that is not closed; see to probes."""
        self.due_at = time.monotonic() + self._told_every
        desk = self._desk
        if desk is not None and len(self._probes):
            asked_at = desk.clock()
            self._heard(self._probes.tend(desk), asked_at)
        span = self.span
        if span is not None and span.counted:
            self.tell(span)
        elif desk is not None:
            again = min(_LOOKED_AFTER, self._probes.lease / 3) if len(self._probes) else _LOOKED_AFTER
            self.due_at = time.monotonic() + again
            asked_at = desk.clock()
            try:
                view = desk.store.circuit(self.name)
            except StoreError:
                return
            self.apply(view, asked_at=asked_at)

    # -- news -------------------------------------------------------------------------------------------------------

    def apply(self, view: CircuitView, *, asked_at: float | None = None, left: float | None = None) -> None:
        """The store says, or said some time ago, that the circuit stands so; *left*: seconds until its next change,
        where that is known (else the store's clock may be asked).

        An older generation is news only where it answers a question (of the instant *asked_at*) that was asked when
        the newer one was known already: then the store has been emptied.
        """
        desk = self._desk
        if desk is None:
            return
        until = math.inf
        if view.state not in _PASSES and view.until is not None:
            until = desk.clock() + (max(0.0, view.until - desk.now()) if left is None else left)
        with self._lock:
            before = self.view
            if view.generation < before.generation and (asked_at is None or asked_at <= self._applied_at):
                return
            changed = view.state != before.state or view.generation != before.generation
            ended = self.span
            goes_on = _closed_or_paused(before) and _closed_or_paused(view) and view.generation > before.generation
            if (changed and not goes_on) or self._applied_at == -math.inf:
                self._since = view.generation
            self.view = view
            if changed or self._applied_at == -math.inf:
                self._applied_at = desk.clock()
                self._until = until if view.state in ("open", "forced_open") else -math.inf
                if view.state in _PASSES:
                    self._begin_span(view, desk)
                else:
                    self.span = None
            elif view.state in _PASSES and self.span is None:
                self._begin_span(view, desk)
            elif view.state in ("open", "forced_open"):
                self._until = until
            if ended is not None and ended is not self.span:
                self._past += ended.successes()
                if goes_on and ended.counted:  # the window goes on: what was counted for it is told
                    desk.soon(functools.partial(self.tell, ended))
        if view.state != before.state:
            self._changed(desk, before, view)

    def _begin_span(self, view: CircuitView, desk: Desk) -> None:
        self.span = Span(view.generation, counted=view.state == "closed", began_at=desk.clock())

    def _changed(self, desk: Desk, before: CircuitView, view: CircuitView) -> None:
        why = view.why or _why(view)
        desk.notify(Event(name="circuit_changed", key=self.label, detail=f"{before.state} to {view.state}: {why}"))
        if self.policy.on_change is None:
            return
        try:
            self.policy.on_change(CircuitChange(name=self.label, before=before.state, after=view.state, why=why))
        except Exception:
            logger.exception("on_change of circuit %s failed", self.label)

    # -- the closed path --------------------------------------------------------------------------------------------

    def guard(self, fn: Callable[..., T], otherwise: Callable[..., T], ended: Ended | None = None) -> Callable[..., T]:
        """*fn* guarded by this circuit alone; *otherwise* is called with its arguments where the circuit is not closed.

        What a closed circuit costs, all of it, is here. *ended* settles a call that failed or was slow.
        """
        ended = ended or (lambda circuit, span, exc, slow: circuit.ended(span, exc, slow=slow))
        if self.slow_after is not None:
            return self._guard_timed(fn, otherwise, ended, self.slow_after)

        @functools.wraps(fn)
        def guarded(*args: Any, **kwargs: Any) -> T:
            span = self.span
            if span is None:
                return otherwise(*args, **kwargs)
            try:
                result = fn(*args, **kwargs)
            except BaseException as exc:
                ended(self, span, exc, False)
                raise
            span.calls.add()
            return result

        return guarded

    def _guard_timed(
        self, fn: Callable[..., T], otherwise: Callable[..., T], ended: Ended, slow_after: float
    ) -> Callable[..., T]:
        clock = time.monotonic

        @functools.wraps(fn)
        def guarded(*args: Any, **kwargs: Any) -> T:
            span = self.span
            if span is None:
                return otherwise(*args, **kwargs)
            began = clock()
            try:
                result = fn(*args, **kwargs)
            except BaseException as exc:
                ended(self, span, exc, clock() - began >= slow_after)
                raise
            if clock() - began >= slow_after:
                ended(self, span, None, True)
            else:
                span.calls.add()
            return result

        return guarded

    def ended(self, span: Span | None, exc: BaseException | None, *, slow: bool = False) -> None:
        """A call that began in *span* ended with *exc*, or well."""
        verdict: Verdict = "success" if exc is None else judge(self.policy, exc)
        if self.note(span, verdict, slow=slow):
            self.tell(span)

    def successes(self) -> int:
        """Calls of this process that ended well, of all generations it remembers."""
        span = self.span
        return self._past + self.succeeded.total() + (0 if span is None else span.successes())


def _closed_or_paused(view: CircuitView) -> bool:
    return view.state == "closed" or (view.state == "forced_open" and view.who == PAUSED)


def _why(view: CircuitView) -> str:
    match view.state:
        case "open":
            return f"{view.failures} of {view.calls} calls failed, {view.slow} were slow"
        case "half_open":
            return "the wait is over; probes find out"
        case "closed":
            return "enough probes succeeded"
        case _:
            return f"by {view.who or 'an operator'}"
