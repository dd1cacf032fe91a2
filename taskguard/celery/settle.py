"""From a settlement to what Celery shows of it: the one place where settlements are matched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from celery import Celery, states
from celery.app.task import Context
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, TaskRevokedError
from celery.exceptions import Retry as CeleryRetry

from taskguard import errors
from taskguard.celery.message import context_of, decode_result
from taskguard.clock import iso
from taskguard.envelope import Envelope
from taskguard.record import Failure, State
from taskguard.settlement import (
    Completed,
    DeadLettered,
    Deferred,
    Discarded,
    Drop,
    Replayed,
    Retried,
    Settlement,
)

if TYPE_CHECKING:
    from taskguard.celery.runtime import Runtime
    from taskguard.celery.task import ReliableTask

DEFERRED = "DEFERRED"
"""The result state of a message that rests without having spent an attempt."""

UNFINISHED = frozenset({states.PENDING, states.RECEIVED, states.STARTED, states.RETRY, DEFERRED})
"""The result states of a task whose end nobody has shown yet."""


def settle(task: ReliableTask, request: Any, settlement: Settlement) -> Any:
    """In the run: return the result, or raise what makes Celery record the settlement and go on from it."""
    match settlement:
        case Completed(value):
            return value
        case Replayed(result):
            _free_chord(task, request)
            return decode_result(task.app, result)
        case Retried(due_at, error):
            asked = getattr(request, "taskguard_raise", None)
            if asked is not None:
                raise asked
            # Eager mode has no relay: Celery runs the signature at once.
            again = task.signature_from_request(request, retries=request.retries + 1) if request.is_eager else None
            text = f"retries at {iso(due_at)}"
            raise CeleryRetry(text, exc=error, is_eager=request.is_eager, sig=again) from error
        case Deferred(due_at, why):
            _show(task, request, DEFERRED, {"why": why, "due_at": iso(due_at)})
            raise Ignore(f"deferred: {why}")
        case DeadLettered(failure, error):
            if isinstance(error, MemoryError) or (isinstance(error, Reject) and not request.is_eager):
                # Celery takes the worker down for the one, and shows nothing for the other before 5.7.
                raise errors.DeadLetter(f"{failure.reason}: {failure.error_type}: {failure.message}")
            if isinstance(error, Exception):
                raise error
            _free_chord(task, request)
            raise rebuilt(task.backend, failure)
        case Discarded(why, error):
            if error is not None:
                raise error
            if settlement.visible and not request.is_eager:
                task.backend.mark_as_revoked(request.id, str(why), request=request, store_result=not task.ignore_result)
            elif why is Drop.IGNORED and not request.is_eager:
                _show_ignored(task, request)
            raise Ignore(f"discarded: {why}")
        case _:
            assert_never(settlement)


def announce(app: Celery, envelope: Envelope, settlement: Settlement) -> None:
    """Outside a run: show in the result backend how a message that no worker will see again has ended."""
    context = context_of(app, envelope)
    task = app.tasks.get(envelope.task)
    backend = app.backend if task is None else task.backend
    stores = task is None or not task.ignore_result or bool(task.store_errors_even_if_ignored)
    if isinstance(settlement, DeadLettered):
        exc = settlement.error or rebuilt(backend, settlement.failure)
        backend.mark_as_failure(envelope.task_id, exc, request=context, store_result=stores)
    elif isinstance(settlement, Discarded) and settlement.visible:
        backend.mark_as_revoked(envelope.task_id, str(settlement.why), request=context, store_result=stores)


def rebuilt(backend: Any, failure: Failure) -> Exception:
    """The exception of a dead letter that another delivery buried, as the result backend would give it back.

    The same exception again makes the same state, chord part and errback arguments, so telling it twice does no harm.
    """
    if failure.error_type:
        told = {
            "exc_type": failure.error_type,
            "exc_module": failure.error_module,
            "exc_message": list(failure.arguments) or failure.message,
        }
        exc = backend.exception_to_python(told)
        if isinstance(exc, Exception) and not isinstance(exc, (MemoryError, Reject)):
            return exc
    return errors.DeadLetter(f"{failure.reason}: {failure.message}")


def show_end_again(runtime: Runtime, task: ReliableTask, envelope: Envelope) -> None:
    """After RETRY was shown from outside a run: that may have come late, over the end which the next run has shown.

    Only the state is shown; the chord and the links were told in their time. Celery keeps SUCCESS by itself, but looks
    and writes in two steps.
    """
    record = runtime.store.find(envelope.id)
    if record is None or record.task_id != envelope.task_id:
        return
    if record.state is State.DONE:
        if not task.ignore_result and task.backend.get_state(envelope.task_id) == states.RETRY:
            task.backend.store_result(envelope.task_id, decode_result(task.app, record.result or b""), states.SUCCESS)
    elif record.state is State.DEAD:
        failure = rebuilt(task.backend, Failure.from_json(record.failure))
        task.backend.store_result(envelope.task_id, failure, states.FAILURE)
    elif record.state is State.DISCARDED and record.failure != Drop.REPLACED:
        task.backend.store_result(envelope.task_id, TaskRevokedError(record.failure), states.REVOKED)


def _show_ignored(task: ReliableTask, request: Any) -> None:
    """REVOKED where the body has shown no state of its own; and so end the chord and the chain that wait for it."""
    backend, ignored = task.backend, TaskRevokedError(str(Drop.IGNORED))
    if isinstance(backend, DisabledBackend):
        return
    if not task.ignore_result and backend.get_state(request.id) in UNFINISHED:
        backend.store_result(request.id, ignored, states.REVOKED, request=request)
    if request.chord:
        _free_chord(task, request)
        backend.on_chord_part_return(request, states.REVOKED, ignored)
    steps = list(request.chain or ())
    if hasattr(backend, "_fail_chain"):  # since Celery 5.7, which goes into chords too
        backend._fail_chain(steps, ignored, state=states.REVOKED)
        return
    for step in steps:
        following = Context({**step, **step["options"], "group": step["options"].get("group_id")})
        if following.task_id:
            following.id = following.task_id
            backend.mark_as_failure(following.id, ignored, request=following, call_errbacks=False, state=states.REVOKED)


def _free_chord(task: ReliableTask, request: Any) -> None:
    """Let this delivery send the chord's body, should the one that was about to have died over it.

    On Redis the part that completes a chord claims the sending of its body for twice ``result_chord_join_timeout``. A
    redelivery comes sooner, and only once. A sender that lives finds its claim gone and leaves the body to this one.
    """
    backend = task.backend
    if request.chord and request.group and hasattr(backend, "_chord_claim_extend_script"):
        claim = backend.get_key_for_group(request.group, ".c")
        if backend.get(claim) != b"done":  # which Celery leaves there when the body is sent
            backend.delete(claim)


def _show(task: ReliableTask, request: Any, state: str, meta: dict[str, str]) -> None:
    if not request.is_eager and not task.ignore_result:
        task.backend.store_result(request.id, meta, state, request=request)
