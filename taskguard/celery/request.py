"""The request: a delivery as the worker's parent process knows it.

It makes the run's holder before the pool and hands it to the child with the message, watches the lease, and settles
what no child can: a lost child, a hard time limit, a message past its deadline. What runs here shares the worker's
event loop, so it makes one bounded call to the store and no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.worker import state
from celery.worker.request import Request
from celery.worker.state import revoked as revoked_tasks
from celery.worker.state import task_ready
from kombu.exceptions import EncodeError, OperationalError

from taskguard.celery.message import received_envelope
from taskguard.celery.run import DELIVERY, following_attempt, judge
from taskguard.celery.runtime import new_holder, runtime_of
from taskguard.celery.settle import announce, show_end_again
from taskguard.clock import wall_clock
from taskguard.custody import Hold
from taskguard.errors import MessageError, StoreError
from taskguard.events import Event
from taskguard.gate import Custody
from taskguard.lifecycle import TERMINAL, awaits
from taskguard.record import Attempt, Failure, Reason, State
from taskguard.retry import GiveUp
from taskguard.settlement import DeadLettered, Discarded, Drop, Retried, Settlement


class ReliableRequest(Request):  # type: ignore[misc]
    """Celery's request of a `ReliableTask`."""

    time_limits: tuple[float | None, float | None]

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self.runtime = runtime_of(self._app)
        converted = (dict(options["headers"]), options["body"]) if options.get("decoded") else None
        self.envelope = received_envelope(message, self._task, converted)
        self.hold = Hold(self.envelope.id, new_holder(self._hostname))
        self._expires = None  # the deadline in the envelope is the same instant, and is never dropped in silence
        self._request_dict[DELIVERY] = (self.envelope, self.hold.holder)
        self._timed_out: Settlement | None = None
        self._acknowledging = threading.Lock()

    def _remaining(self) -> float | None:
        deadline = self.envelope.deadline_at
        return None if deadline is None else deadline - wall_clock()

    def revoked(self) -> bool:
        """Asked by Celery before the pool: whether the message ends here."""
        if self._already_revoked:
            return True
        remaining = self._remaining()
        if remaining is not None and remaining <= 0 and self._settle_unstarted(self.runtime.prompt_gate.expire):
            return True
        if self.id in revoked_tasks:
            self._settle_unstarted(lambda custody: self.runtime.prompt_gate.discard(custody, Drop.REVOKED))
        if super().revoked():
            return True
        if remaining is not None and self._task.interrupt_at_deadline:
            hard, declared = self.time_limits
            soft = declared or self._task.soft_time_limit
            self.time_limits = (hard, min(soft, remaining) if soft else remaining)
        return False

    def _settle_unstarted(self, ending: Callable[[Custody], Settlement]) -> bool:
        """End a message that no child needs to see, and show it. False: the child's gate decides, with patience."""
        try:
            entered = self.runtime.prompt_gate.enter(self.envelope, self._task.terms, holder=self.hold.holder)
            settlement = ending(entered) if isinstance(entered, Custody) else entered
        except StoreError:
            return False
        if not isinstance(settlement, (DeadLettered, Discarded)):
            return False
        task_ready(self)
        self._already_revoked = True
        self._end_shown(settlement)
        return True

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A child has taken the message: from here on its lease is kept alive, and its death is noticed.

        Not before: the pool can lose a child whose first sign of life it never read, and a lease that was renewed for
        that one would never end.
        """
        if self.runtime.heartbeat is not None:
            self.runtime.heartbeat.watch(self.hold, on_renewed=self.acknowledge_early)
        super().on_accepted(pid, time_accepted)

    def acknowledge_early(self) -> None:
        """The store holds the message for certain: the broker's copy may go."""
        if self.runtime.settings.early_ack:
            with self._acknowledging:  # the heartbeat's thread is here, and the event loop may be at the end of the run
                super().acknowledge()

    @property
    def can_be_broken_off(self) -> bool:
        """Whether it runs, was acknowledged early, and nobody has ended it."""
        return bool(self.acknowledged and not self._already_cancelled and self.id not in state.successful_requests)

    def acknowledge(self) -> None:
        """All that follows the run is done."""
        with self._acknowledging:
            super().acknowledge()
        self._ended()

    def reject(self, requeue: bool = False) -> None:
        """The broker gets the message back, or the run ended with a rejection."""
        super().reject(requeue)
        if not requeue:
            self._ended()
        else:
            # Acknowledged early, the broker has nothing to give back: the kept record is the only copy, and stays.
            self._leave()

    def _leave(self) -> None:
        if self.runtime.heartbeat is not None:
            self.runtime.heartbeat.leave(self.hold)

    def _ended(self) -> None:
        if self.runtime.heartbeat is not None:
            self.runtime.heartbeat.end(self.hold)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """A failure reported by the child, or by the pool when the child could not."""
        exc = exc_info.exception
        exc = exc.exc if isinstance(exc, ExceptionWithTraceback) else exc
        if isinstance(exc, TimeLimitExceeded):
            self._settle_time_limit(exc)
            return None  # on_timeout follows, and reports
        why = "the worker was stopped" if state.should_terminate else "the worker lost its broker"
        if self._already_cancelled and self._rest_uncounted(why):
            return None
        if self._already_cancelled or self._already_revoked:
            outcome = super().on_failure(exc_info, send_failed_event, return_ok)
            self._leave()
            return outcome
        if isinstance(exc, (WorkerLostError, SystemExit, KeyboardInterrupt)):
            return self._settle_lost_child(exc)
        if isinstance(exc, Terminated):
            return self._settle_terminated(exc_info)
        if not isinstance(exc, (Reject, Ignore, Retry)) and not self._accounted_for(exc):
            task_ready(self)
            return self.reject(requeue=True)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _accounted_for(self, exc: BaseException) -> bool:
        """See to it that a failure the child reports is in the store. False: the message must come back.

        The gate has settled whatever left the body. What fails before it (a child that cannot begin) or after it
        (links that cannot be sent) never went through the gate.
        """
        try:
            record = self.runtime.store.find(self.hold.id)
            if record is not None and record.state is State.DONE and record.task_id == self.id:
                if isinstance(exc, (OperationalError, StoreError, SoftTimeLimitExceeded)):
                    return False  # a redelivery is told the stored result, and sends the links then
                if isinstance(exc, EncodeError) and not self._followed():
                    return True  # only the result cannot be stored, and Celery says so
                unsent = MessageError(f"completed, but what follows could not be sent: {type(exc).__name__}: {exc}")
                self.runtime.store.bury_message(
                    self.envelope, failure=Failure.of(Reason.PERMANENT_ERROR, unsent, traceback="")
                )
                self.runtime.observers(
                    Event(name="dead_lettered", task=self.envelope.task, task_id=self.id, detail=str(unsent))
                )
            elif record is None or record.holder == self.hold.holder or awaits(record, self.envelope):
                entered = self.runtime.prompt_gate.enter(self.envelope, self._task.terms, holder=self.hold.holder)
                if isinstance(entered, Custody):
                    self.runtime.prompt_gate.bury(entered, Reason.PERMANENT_ERROR, exc)
        except StoreError:
            return False
        return True

    def _followed(self) -> bool:
        """Whether links or a chain come after this task."""
        _, _, embed = self._payload
        return bool(embed) and any(embed.get(part) for part in ("callbacks", "chain", "chord"))

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit has passed. Celery calls this after `on_failure` in some pools, alone in others."""
        if soft:
            super().on_timeout(soft, timeout)
            return
        match self._timed_out or self._settle_time_limit(TimeLimitExceeded(timeout)):
            case Retried(_, error):
                task_ready(self)
                self._retry_shown(error or TimeLimitExceeded(timeout))
            case Discarded():
                task_ready(self)
                self.acknowledge()
            case DeadLettered():
                report = super().on_timeout
                self.runtime.tell(lambda: report(soft, timeout))
            case _:
                task_ready(self)
                self.reject(requeue=True)

    def _settle_time_limit(self, exc: TimeLimitExceeded) -> Settlement | None:
        """A hard time limit spends an attempt: the next one, or a dead letter. Settled once, whoever asks."""
        if self._timed_out is not None:
            return self._timed_out
        gate, envelope = self.runtime.prompt_gate, self.envelope
        try:
            custody = self._custody()
            if custody is None:
                self._timed_out = self._unclaimed_time_limit(exc)
                return self._timed_out
            verdict = judge(self._task, envelope, exc)
            if isinstance(verdict, GiveUp):
                self._timed_out = gate.bury(custody, verdict.reason, exc)
            else:
                following = following_attempt(envelope, delay=verdict)
                self._timed_out = gate.retry(custody, following, due_at=wall_clock() + verdict, error=exc)
        except StoreError:
            return None
        return self._timed_out

    def _unclaimed_time_limit(self, exc: TimeLimitExceeded) -> Settlement | None:
        """The run has no custody: it ended by itself, another has taken over, or it had not begun."""
        record = self.runtime.store.find(self.hold.id)
        if record is not None and record.state in TERMINAL and record.task_id == self.id:
            return None  # a redelivery goes on from the outcome
        attempt = Attempt(at=wall_clock(), worker=str(self._hostname), outcome="timeout", error=str(exc))
        if self.runtime.store.crash(self.hold, self.envelope, attempt=attempt):
            return self._poisoned() or Retried(wall_clock(), exc)
        return Discarded(Drop.CUSTODY_LOST)

    def _poisoned(self) -> DeadLettered | None:
        """After a counted crash: the dead letter it has become, because no child may ever get as far as the claim."""
        record = self.runtime.store.find(self.hold.id)
        if record is None or record.crashes < self._task.terms.max_crashes:
            return None
        entered = self.runtime.prompt_gate.enter(self.envelope, self._task.terms, holder=self.hold.holder)
        return entered if isinstance(entered, DeadLettered) else None

    def _custody(self) -> Custody | None:
        record = self.runtime.store.find(self.hold.id)
        if record is None or record.state is not State.RUNNING or record.holder != self.hold.holder:
            return None
        return Custody(
            self.envelope,
            self.runtime.settings.namespace,
            self.hold.holder,
            record.token,
            record.crashes,
            self._task.terms,
        )

    def _settle_lost_child(self, exc: BaseException) -> None:
        """The child is gone: count the crash and make the message due, without waiting for the lease to end."""
        task_ready(self)
        lost = exc if isinstance(exc, WorkerLostError) else WorkerLostError(f"Worker exited prematurely: {exc!r}.")
        attempt = Attempt(at=wall_clock(), worker=str(self._hostname), outcome="crash", error=str(lost))
        if state.should_terminate and self._rest_uncounted("the worker was stopped"):
            return
        counted, buried = False, None
        try:
            counted = self.runtime.store.crash(self.hold, self.envelope, attempt=attempt)
            buried = self._poisoned() if counted else None
        except StoreError:
            pass  # counted or not, the record says what is to be done with the message
        if not counted:
            # The run ended before the child died, or the store is away: a redelivery finds out and goes on from there.
            self.reject(requeue=True)
            return
        self.runtime.observers(
            Event(
                name="crash",
                task=self.envelope.task,
                task_id=self.envelope.task_id,
                key=self.envelope.key,
                detail=str(lost),
            )
        )
        if buried is None:
            self._retry_shown(lost)
        else:
            self._end_shown(buried)

    def _rest_uncounted(self, why: str) -> bool:
        """The worker itself killed the child: nobody's fault, and the message is due at once, elsewhere."""
        try:
            custody = self._custody()
            if custody is None:
                return False
            self.runtime.prompt_gate.again(custody, why=why)
        except StoreError:
            return False
        self.acknowledge()
        return True

    def _settle_terminated(self, exc_info: Any) -> Any:
        """Terminated by an operator: the run is discarded, and Celery shows it revoked."""
        try:
            custody = self._custody()
            if custody is not None:
                self.runtime.prompt_gate.discard(custody, Drop.REVOKED)
        except StoreError:
            return self.reject(requeue=True)
        return super().on_failure(exc_info)

    def _end_shown(self, settlement: Settlement) -> None:
        """Show how the message ended, then let the broker's copy go."""

        def show() -> None:
            announce(self._app, self.envelope, settlement)
            self.acknowledge()

        self.runtime.tell(show)

    def _retry_shown(self, exc: BaseException) -> None:
        """Show the state RETRY, then let the broker's copy go."""

        def show() -> None:
            try:
                if self.store_errors:
                    self.task.backend.mark_as_retry(self.id, exc, request=self._context)
                    show_end_again(self.runtime, self.task, self.envelope)
                self.send_event("task-retried", exception=repr(exc), traceback="")
            finally:
                self.acknowledge()

        self.runtime.tell(show)
