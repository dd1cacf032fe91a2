"""One delivery, from the tracer's call to the settlement it becomes.

The body runs between `Gate.enter` and one of the gate's exits. What leaves the body is read here: a value, an asked
retry, a replacement, or an exception, which the task's retry policy judges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, SoftTimeLimitExceeded, TimeLimitExceeded
from celery.exceptions import Retry as CeleryRetry
from celery.utils.log import get_logger

from taskguard import headers
from taskguard.celery import admission, results, transactional
from taskguard.celery.entrance import Entrance, entrance_of
from taskguard.celery.message import eager_envelope, encode_result
from taskguard.celery.publishing import inherited_deadline
from taskguard.celery.runtime import new_holder
from taskguard.celery.settle import settle
from taskguard.clock import instant, wall_clock
from taskguard.downstream import timeouts
from taskguard.envelope import Envelope
from taskguard.errors import CustodyLost, DownstreamTimeout, Refused, StoreError, StoreUnavailable
from taskguard.gate import Custody, Gate
from taskguard.policies import Retry, RetryEvent
from taskguard.record import Reason
from taskguard.retry import GiveUp, decide
from taskguard.settlement import Completed, Drop, Settlement

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask

logger = get_logger(__name__)
Outcome = TypeVar("Outcome")

DELIVERY = "taskguard_delivery"
"""The request's entry in which the worker's parent hands (envelope, holder) to the child."""

REQUEUE_PAUSE = 1.0
"""Seconds a message rests that its task rejected, or the store refused; at the broker it would come back at once."""


@dataclass(frozen=True, slots=True)
class AskedRetry:
    """What ``self.retry`` asked for. ``following`` is None in eager mode, where Celery runs the retry itself."""

    exception: CeleryRetry
    following: Envelope | None
    due_at: float


def deliver(task: ReliableTask, request: Any, args: Any, kwargs: Any) -> Any:
    """Settle one delivery. Returns the task's result or raises what makes Celery show the settlement."""
    gate = task.guard.gate
    handed = getattr(request, DELIVERY, None)
    if request.headers:
        # Celery takes every unknown entry for a header of the user's, and would send it on with a retry.
        request.headers = {name: value for name, value in request.headers.items() if name != DELIVERY}
    envelope, holder = handed or (eager_envelope(task, request, args, kwargs), new_holder(request.hostname))
    entrance = entrance_of(task, envelope, args, kwargs, holder=holder) if handed else None
    try:
        through = None if entrance is None else entrance.claim
        entered = _whole(lambda: gate.enter(envelope, task.terms, holder=holder, through=through))
        if isinstance(entered, Custody):
            request.taskguard_custody = entered
            try:
                entered = _run(task, request, gate, entered, args, kwargs, entrance)
            finally:
                transactional.close(task)
    except StoreError as exc:
        if request.is_eager:
            raise
        if not isinstance(exc, StoreUnavailable):
            time.sleep(REQUEUE_PAUSE)  # it answered at once, and would again
        # Unsettled: the broker, or the lease, brings the message back. Celery logs the whole chain, with tracebacks.
        raise Reject(exc, requeue=True) from None
    finally:
        if entrance is not None:
            entrance.close()
    return settle(task, request, entered)


def _whole(step: Callable[[], Outcome]) -> Outcome:
    """Do a step of the gate whole: a soft time limit that strikes in it comes once, and the step may be repeated."""
    try:
        return step()
    except SoftTimeLimitExceeded:
        return step()


def _run(
    task: ReliableTask, request: Any, gate: Gate, custody: Custody, args: Any, kwargs: Any, entrance: Entrance | None
) -> Settlement:
    if task.budget is not None and request.retries == 0:
        task.budget.record_try()
    token = inherited_deadline.set(custody.envelope.deadline_at)
    budget = timeouts.deadline_at.set(custody.envelope.deadline_at)
    try:
        started = None if entrance is None else entrance.block
        with transactional.joined(task, custody), admission.admitted(task, custody, args, kwargs, started):
            if entrance is not None and entrance.rests_until is not None:
                return gate.deferred(custody, due_at=entrance.rests_until, why="put off in the step that claimed it")
            task.before_body(request.id, request.args, request.kwargs)
            value = task.run(*args, **kwargs)
    except Refused as exc:
        refused = exc
        rests_until = None if entrance is None else entrance.rests_until
        call = admission.Call(args, kwargs, lambda value: _completed(task, gate, custody, value), rests_until)
        return _whole(lambda: admission.put_off(task, gate, custody, refused, call))
    except CeleryRetry as exc:
        asked = exc
        return _whole(lambda: _asked_retry(task, gate, custody, asked))
    except Ignore:
        return _discarded(task, gate, custody)
    except Reject as exc:
        rejected = exc
        return _whole(lambda: _rejected(task, gate, custody, rejected))
    except (SystemExit, KeyboardInterrupt) as exc:
        if request.is_eager or not task.guard.beats_here:
            raise  # the pool child ends, and its parent counts the crash
        left = exc
        return _whole(lambda: gate.crash(custody, left))
    except Exception as exc:  # noqa: BLE001 (whatever leaves the body is settled)
        failure = exc
        return _whole(lambda: _failed(task, gate, custody, failure))
    finally:
        timeouts.deadline_at.reset(budget)
        inherited_deadline.reset(token)
    if getattr(request, "taskguard_retry", None) is not None:
        transactional.close(task)
        return _whole(lambda: _asked_retry(task, gate, custody, request.taskguard_retry.exception))
    for each in task.downstreams:
        each.remember(task.run, args, kwargs, value)
    return _completed(task, gate, custody, value)


def _completed(task: ReliableTask, gate: Gate, custody: Custody, value: Any) -> Settlement:
    serializer = task.guard.result_serializer
    try:
        result = encode_result(serializer, value)
    except Exception:  # noqa: BLE001
        # The body ran; only its duplicates go without the value. Celery reports what it cannot store itself.
        result = encode_result(serializer, None)
    request = task.request
    entry = results.entry_of(task, request, value)
    step = transactional.completing(task, custody, result)
    try:
        settlement = _whole(lambda: gate.complete(custody, value, result=result, entry=entry, step=step))
    except Exception as exc:
        if step is None or isinstance(exc, StoreError):
            raise
        failure = exc
        return _whole(lambda: _failed(task, gate, custody, failure))
    if entry is not None and isinstance(settlement, Completed):
        request.ignore_result = True  # it is written
    return settlement


def _discarded(task: ReliableTask, gate: Gate, custody: Custody) -> Settlement:
    why = Drop.REPLACED if getattr(task.request, "taskguard_replaced", False) else Drop.IGNORED
    step = transactional.discarding(task, custody, why)
    try:
        return _whole(lambda: gate.discard(custody, why, step=step))
    except Exception as exc:
        if step is None or isinstance(exc, StoreError):
            raise
        failure = exc  # the replacement went with the rest
        return _whole(lambda: _failed(task, gate, custody, failure))


def _rejected(task: ReliableTask, gate: Gate, custody: Custody, exc: Reject) -> Settlement:
    if not exc.requeue:
        return gate.bury(custody, Reason.REJECTED, exc)
    following = headers.next_attempt(custody.envelope, retries=task.request.retries)
    return gate.defer(custody, following, due_at=wall_clock() + REQUEUE_PAUSE, why="rejected with requeue")


def _asked_retry(task: ReliableTask, gate: Gate, custody: Custody, raised: CeleryRetry) -> Settlement:
    asked = getattr(task.request, "taskguard_retry", None)
    if asked is None:
        # ``raise Retry(...)`` without ``self.retry``: Celery would show RETRY and send nothing.
        when = raised.when if raised.when is not None else task.default_retry_delay
        asked = AskedRetry(raised, None, instant(when, now=wall_clock(), what="Retry.when"))
    following = headers.next_attempt(custody.envelope, retries=custody.envelope.retries + 1)
    if asked.following is not None:
        # The retry may change arguments, queue or limits; key, deadline and order stay this message's.
        following = asked.following.replace(
            key=custody.envelope.key,
            sequence=following.sequence,
            deadline_at=custody.envelope.deadline_at,
            headers=headers.redelivered_headers_dropped(asked.following.headers),
        )
        following = following.replace(headers=headers.stamped(following))
    due_at = wall_clock() if task.request.is_eager else asked.due_at
    settlement = gate.retry(custody, following, due_at=due_at, error=asked.exception.exc)
    task.request.taskguard_raise = asked.exception
    return settlement


def _failed(task: ReliableTask, gate: Gate, custody: Custody, exc: Exception) -> Settlement:
    """An exception left the body: another attempt, or a dead letter."""
    asked = getattr(task.request, "taskguard_retry", None)
    if asked is not None:  # ``self.retry(throw=False)`` came before it, and in Celery had been sent by now
        return _asked_retry(task, gate, custody, asked.exception)
    if isinstance(exc, CustodyLost):  # discarded, unless the store has only forgotten the run
        return gate.again(custody, why="the run was told that it had lost custody")
    deadline = custody.envelope.deadline_at
    late = deadline is not None and wall_clock() >= deadline
    if isinstance(exc, (SoftTimeLimitExceeded, DownstreamTimeout)) and late:
        return gate.expire(custody, exc)
    if isinstance(exc, MaxRetriesExceededError) or getattr(task.request, "taskguard_exhausted", False):
        return gate.bury(custody, Reason.MAX_RETRIES, exc)
    if task.downstreams and not late:
        spared = admission.spare(task, gate, custody, exc)
        if spared is not None:
            return spared
    verdict = judge(task, custody.envelope, exc)
    if isinstance(verdict, GiveUp):
        exc.add_note(f"taskguard: {verdict.why}")
        return gate.bury(custody, verdict.reason, exc)
    following = following_attempt(custody.envelope, delay=verdict)
    _tell_on_retry(task, custody, exc, verdict)
    return gate.retry(custody, following, due_at=wall_clock() + verdict, error=exc)


def _tell_on_retry(task: ReliableTask, custody: Custody, exc: Exception, wait: float) -> None:
    listener = task.effective_retry.on_retry
    if listener is None:
        return
    event = RetryEvent(task=task.name, task_id=custody.envelope.task_id, attempt=custody.attempt, error=exc, delay=wait)
    try:
        listener(event)
    except Exception:
        logger.exception("on_retry of %s failed; the retry goes on", task.name)


def judge(task: ReliableTask, envelope: Envelope, exc: BaseException) -> float | GiveUp:
    """The seconds to wait before the next attempt, or why there is none."""
    stamp = envelope.headers.get(headers.KEY)
    previous = stamp.get("delay") if isinstance(stamp, Mapping) else None
    decision = decide(
        task.effective_retry,
        exc,
        retries=envelope.retries,
        previous=previous if isinstance(previous, (int, float)) else None,
        now=wall_clock(),
        budget=task.budget,
    )
    return decision if isinstance(decision, GiveUp) else decision.delay


def following_attempt(envelope: Envelope, *, delay: float) -> Envelope:
    """The next attempt's message; the wait is carried along, because decorrelated jitter grows from it."""
    following = headers.next_attempt(envelope, retries=envelope.retries + 1)
    stamp = {**following.headers[headers.KEY], "delay": delay}
    return following.replace(headers={**following.headers, headers.KEY: stamp})


def celery_policy(task: ReliableTask) -> Retry:
    """The policy where none is declared: Celery's bounds for transient errors.

    A task with ``autoretry_for`` has said what to retry, and Celery's wrapper does it; beyond that only a hard time
    limit and a failed commit are retried, which the wrapper never sees.
    """
    if getattr(task, "autoretry_for", ()):
        return Retry(
            max_retries=task.max_retries,
            retry_if=lambda exc: isinstance(exc, TimeLimitExceeded) or transactional.failed_to_commit(exc),
        )
    backoff = float(getattr(task, "retry_backoff", False) or 1.0)
    longest = float(getattr(task, "retry_backoff_max", 600))
    return Retry(
        max_retries=task.max_retries,
        first_delay=min(max(backoff, 0.001), longest),
        max_delay=longest,
        jitter="full" if getattr(task, "retry_jitter", True) else "none",
    )


def stamp_replacement(sig: Any, sequence: int) -> None:
    """Mark every task of a replacing workflow as newer than the run it replaces."""
    for part in ("tasks", "body"):
        inner = getattr(sig, part, None)
        for child in inner if isinstance(inner, (list, tuple)) else [inner]:
            if isinstance(child, dict) and hasattr(child, "options"):
                stamp_replacement(child, sequence)
    given = dict(sig.options.get("headers") or {})
    sig.options["headers"] = {**given, headers.KEY: {**(given.get(headers.KEY) or {}), "seq": sequence}}
