"""What rules and downstreams say before a run, and what becomes of a task that one of them refuses.

Asked after the claim, so that a duplicate spends no permit, and before any code of the task; where custody and permits
rest on one Redis server, in the same step (see `entrance`). A refused task rests until its own slot in the line, or,
where a circuit is open, until the first probe can go and a place after that; it has spent no attempt. Parked tasks come
back at the declared rate, slowly at first: all at once they would open the circuit again.

Several downstreams are asked one after the other. What the first has admitted is spent when the second refuses, and the
task keeps its place with the first.
"""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from taskguard import headers
from taskguard.celery.pausing import pause_for
from taskguard.clock import iso, seconds
from taskguard.downstream import service as downstreams
from taskguard.downstream.blocks import PermitBlock
from taskguard.downstream.circuit import Circuit, judge
from taskguard.downstream.desk import Desk, desk_of
from taskguard.downstream.refusals import PROBING
from taskguard.downstream.service import Downstream
from taskguard.envelope import Envelope
from taskguard.errors import CircuitOpenError, ConfigurationError, Refused, StoreError
from taskguard.gate import Custody, Gate
from taskguard.headers import Booking
from taskguard.limiter.identity import TaskIdentity
from taskguard.permits import Ask, Permit, RateAsk
from taskguard.policies import Adaptive, CircuitBreaker, FixedWindow, Rate
from taskguard.record import Reason
from taskguard.settlement import Settlement

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask

LATE = 0.25
"""Seconds a run that came back for its slot waits for it here: resting again would take longer."""
JITTER = 0.1
"""Of a wait that is nobody's slot: so much more, at random, lest all that were refused together come back together."""
SPARED = 10
"""How often a message may fail at an open circuit's cost. A message that fails by its own fault must end some day."""
PARTS = frozenset({"client", "endpoint", "tier"})
"""What a task may say of who calls it."""
COUNTER = FixedWindow(1e6, per=86400.0)
"""Counts the parked, and refuses none of them."""


def declared_downstreams(declared: object, *, task: str) -> tuple[Downstream, ...]:
    """What *task* declares as its ``downstream``, one or several. Raises ConfigurationError."""
    if declared is None:
        return ()
    found = tuple(declared) if isinstance(declared, (list, tuple)) else (declared,)
    for each in found:
        if not isinstance(each, Downstream):
            raise ConfigurationError(
                f'{task}: downstream={each!r} is no Downstream; give Downstream("bank", rate=...), or a list of them'
            )
    names = [each.name for each in found]
    for each in found:
        if names.count(each.name) > 1:
            raise ConfigurationError(f"{task}: downstream {each.name!r} is named twice; one permit is enough")
        policy = each.circuit_policy
        if policy is not None and policy.on_open == "fallback" and each.fallback is None:
            raise ConfigurationError(
                f'{task}: the circuit of {each.name!r} says on_open="fallback" and it has none; give it fallback=...'
            )
    return found


def declared_identity(declared: object, signature: inspect.Signature, *, task: str) -> TaskIdentity | None:
    """Who a run of *task* works for, by its ``limited``; None where no rules are asked. Raises ConfigurationError."""
    if declared is False or declared is None:
        return None
    parts = {} if declared is True else declared
    if not isinstance(parts, Mapping) or not parts.keys() <= PARTS:
        raise ConfigurationError(
            f"{task}: limited={declared!r} does not say who calls; give True, or a dictionary with some of "
            f'{", ".join(sorted(PARTS))}, such as {{"client": "{{tenant}}"}}'
        )
    return TaskIdentity(task, signature, **parts)


@contextmanager
def coming_back(task: ReliableTask, envelope: Envelope) -> Iterator[frozenset[str]]:
    """Questions that are asked in this block book slots, and use the bookings that the message brought: their names."""
    booked = frozenset(headers.bookings(envelope))
    books = downstreams.booking.set(not task.request.is_eager)
    came = downstreams.booked_for.set(booked)
    try:
        yield booked
    finally:
        downstreams.booked_for.reset(came)
        downstreams.booking.reset(books)


def admitted(
    task: ReliableTask, custody: Custody, args: Sequence[Any], kwargs: Mapping[str, Any], started: PermitBlock | None
) -> AbstractContextManager[object]:
    """The run's block: its downstreams let it in, hold its slots, and judge how it ends. Raises Refused.

    The body runs under the budget that their timeouts give, or what the deadline leaves where that is less. *started*:
    the block of the first downstream, where that was asked together with the claim.
    """
    if not task.downstreams and type(task)._identity is None:
        return coming_back(task, custody.envelope)  # what the body asks may book, too
    return _admitted(task, custody, args, kwargs, started)


@contextmanager
def _admitted(
    task: ReliableTask, custody: Custody, args: Sequence[Any], kwargs: Mapping[str, Any], started: PermitBlock | None
) -> Iterator[None]:
    with coming_back(task, custody.envelope) as booked, ExitStack() as stack:
        identity = _identity_of(task)
        if identity is not None:
            task.guard.limiter.permit(identity.of(args, kwargs, task.request.headers), name=_by_rules(task))
        for each in task.downstreams:
            _enter(stack, each, task, args, kwargs, patient=each.name in booked, block=started)
            started = None
        yield


def _identity_of(task: ReliableTask) -> TaskIdentity | None:
    declared = type(task)._identity
    if declared is not None and declared.task != task.name:  # Celery named the task after its class was made
        type(task)._identity = declared = replace(declared, task=task.name)
    return declared


def _by_rules(task: ReliableTask) -> str:
    """The name of its place with the rules; a limiter that the body asks has another."""
    return f"{task.name} (rules)"


def _enter(
    stack: ExitStack, each: Downstream, task: ReliableTask, args: Any, kwargs: Any,
    *, patient: bool, block: PermitBlock | None,
) -> None:  # fmt: skip
    left = LATE if patient else 0.0
    if block is not None:  # its question has used the booking
        downstreams.booked_for.set(downstreams.booked_for.get() - {each.name})
    while True:
        try:
            stack.enter_context(block or block_of(each, task, args, kwargs))
            return
        except Refused as refused:
            wait = _wait(refused, each.desk)
            if isinstance(refused, CircuitOpenError) or wait is None or wait > left or not patient:
                raise
        left -= max(wait, 0.001)
        time.sleep(max(wait, 0.001))
        downstreams.booked_for.set(downstreams.booked_for.get() | {each.name})
        block = None


def block_of(each: Downstream, task: ReliableTask, args: Any, kwargs: Any) -> PermitBlock:
    """The run as one call of a downstream."""
    return each.permit(of=task.run, args=args, kwargs=kwargs)


def _wait(refused: Refused, desk: Desk) -> float | None:
    """Seconds until the slot, or until it is worth asking again; None: never."""
    return refused.retry_after if refused.slot_at is None else max(0.0, refused.slot_at - desk.now())


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a run, and how a value becomes its result."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    complete: Callable[[Any], Settlement]
    rests_until: float | None = None
    """The store has deferred the run already, until then."""


def put_off(task: ReliableTask, gate: Gate, custody: Custody, refused: Refused, call: Call) -> Settlement:
    """The task comes back when the call can be made. No attempt is spent."""
    if call.rests_until is not None:
        return gate.deferred(custody, due_at=call.rests_until, why=str(refused))
    declared = next((each for each in task.downstreams if each.name == refused.downstream), None)
    policy = declared.circuit_policy if declared is not None else None
    is_open = isinstance(refused, CircuitOpenError)
    if is_open and policy is not None and policy.on_open == "dead_letter":
        return gate.bury(custody, Reason.CIRCUIT_OPEN, refused)
    if is_open and declared is not None and policy is not None and policy.on_open == "fallback":
        with suppress(Refused):  # no link of the chain has an answer: then it waits
            return call.complete(declared.instead(refused, task.run, call.args, call.kwargs))
    if task.request.is_eager:  # nobody would bring it back
        return gate.bury(custody, Reason.CIRCUIT_OPEN if is_open else Reason.REFUSED, refused)
    if is_open:
        wait = _wait_in_open(refused, policy, None if declared is None else declared.guard.circuit)
        if policy is not None and policy.on_open == "pause_queue":
            pause_for(task.guard, custody.envelope, wait, who=f"circuit {refused.downstream}", why=str(refused))
        return _park(task, gate, custody, declared, refused, wait)
    if refused.retry_after is None:
        return gate.bury(custody, Reason.REFUSED, refused)
    if refused.slot_at is not None:
        mine, due_at = Booking(refused.slot_at, refused.limit), refused.slot_at
    else:
        mine, due_at = None, _now() + refused.retry_after * (1 + JITTER * random.random())
    return _rest(task, gate, custody, refused, due_at, mine)


def spare(task: ReliableTask, gate: Gate, custody: Custody, failure: BaseException) -> Settlement | None:
    """Put off a run that failed and finds the circuit of its downstream open: it was the probe, or one of those that
    tripped it. None: the failure is the task's own.
    """
    if task.request.is_eager or headers.spared(custody.envelope) >= SPARED:
        return None
    for each in task.downstreams:
        policy = each.circuit_policy
        if policy is None or policy.on_open not in ("defer", "pause_queue") or judge(policy, failure) != "failure":
            continue
        assert each.circuit is not None
        view = each.circuit.view
        if view.state not in ("open", "half_open", "forced_open"):
            continue
        wait = None if view.until is None else max(0.0, view.until - each.desk.now())
        refused = CircuitOpenError(
            f"{each.name}: {type(failure).__name__}, and its circuit is {view.state}; no attempt is spent",
            retry_after=wait,
            downstream=each.name,
            limit=each.name,
        )
        wait = _wait_in_open(refused, policy, each.circuit)
        if policy.on_open == "pause_queue":
            pause_for(task.guard, custody.envelope, wait, who=f"circuit {each.name}", why=str(refused))
        return _park(task, gate, custody, each, refused, wait, spared=headers.spared(custody.envelope) + 1)
    return None


def _now() -> float:
    """By the clock of the application's permit store, which is its message store's too, as a rule: what rests until an
    instant is due by that one, however wrong this host's is."""
    return desk_of(None).now()


def _wait_in_open(refused: Refused, policy: CircuitBreaker | None, circuit: Circuit | None) -> float:
    """Seconds until the first probe can go, or has ended. Who opens a circuit for good may close it at any moment."""
    longest = seconds(policy.wait_in_open) if policy is not None else 30.0
    wait = longest if refused.retry_after is None else refused.retry_after
    return min(wait, PROBING) if circuit is not None and circuit.view.state == "half_open" else wait


def _park(
    task: ReliableTask, gate: Gate, custody: Custody, declared: Downstream | None, refused: Refused, wait: float,
    *, spared: int = 0,
) -> Settlement:  # fmt: skip
    place = JITTER * wait * random.random()
    circuit = None if declared is None else declared.guard.circuit
    if declared is not None and circuit is not None:
        place = _place(task, declared, circuit.view.generation)
    return _rest(task, gate, custody, refused, _now() + wait + place, Booking(), spared=spared)


def _place(task: ReliableTask, declared: Downstream, generation: int) -> float:
    """Seconds after the first probe at which this one of the parked tasks comes back.

    They come at the declared rate, which grows from nothing to all of it over ``slow_start``; where no rate is
    declared, at random, more and more of them as that time goes by.
    """
    policy = declared.circuit_policy
    slow = seconds(policy.slow_start) if policy is not None else 0.0
    pace = min((_per_second(each.policy) for each in declared.limits if each.key is None), default=None)
    if pace is not None:
        name = f"{declared.name}/parked/{generation}"
        with suppress(StoreError):
            answer = task.guard.permits.admit(Ask(rates=(RateAsk(name, COUNTER),)))
            if isinstance(answer, Permit):
                number = COUNTER.limit - answer.rates[0].remaining - 1
                ramp = pace * slow / 2
                return math.sqrt(2 * slow * number / pace) if number < ramp else number / pace + slow / 2
    return max(slow, JITTER) * math.sqrt(random.random())


def _per_second(policy: Rate | Adaptive) -> float:
    return (policy.start if isinstance(policy, Adaptive) else policy.limit) / policy.period


def _rest(
    task: ReliableTask, gate: Gate, custody: Custody, refused: Refused, due_at: float, mine: Booking | None,
    *, spared: int = 0,
) -> Settlement:  # fmt: skip
    envelope = custody.envelope
    due_at = math.ceil(due_at * 1000) / 1000  # stores keep milliseconds, and a moment too soon is refused
    if envelope.deadline_at is not None and due_at >= envelope.deadline_at:
        _unbook(task, refused.downstream, mine)
        when = f"{iso(due_at)}, {due_at - envelope.deadline_at:.3g} s after it"
        whose = "its slot of" if mine is not None and mine.at else "it could come back to"
        return gate.expire(custody, refused, why=f"{whose} limit {refused.limit!r} at {when} ({refused})")
    following = following_of(task, envelope, refused.downstream, mine, spared=spared)
    settlement = gate.defer(custody, following, due_at=due_at, why=str(refused))
    if custody.lost:
        _unbook(task, refused.downstream, mine)
    return settlement


def following_of(
    task: ReliableTask, envelope: Envelope, refused_by: str, mine: Booking | None, *, spared: int = 0
) -> Envelope:
    """The next delivery of a message that *refused_by* refused. Who has waited its turn with one downstream keeps its
    place there while another refuses."""
    kept = {name: Booking() for name in headers.bookings(envelope)}
    if refused_by != _by_rules(task):  # they are asked first: what refused there has asked no downstream
        kept |= {each.name: Booking() for each in task.downstreams if each.name != refused_by and each.limits}
        if type(task)._identity is not None:
            kept[_by_rules(task)] = Booking()
    booked = kept if mine is None else kept | {refused_by: mine}
    following = headers.next_attempt(envelope, retries=envelope.retries)
    return headers.with_bookings(following, booked, spared=spared or headers.spared(envelope))


def _unbook(task: ReliableTask, name: str, booking: Booking | None) -> None:
    if booking is None or booking.at <= _now():
        return
    store = next((each.permits for each in task.downstreams if each.name == name), task.guard.permits)
    with suppress(StoreError):  # nobody waits longer than this one slot for it
        store.unbook(booking.limit or name, booking.at)
