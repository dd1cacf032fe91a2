"""The gate: every delivery goes in through `Gate.enter` and out through one of its exits.

It decides with the store, and knows neither Celery nor where it runs: in a pool child, in a worker's parent for a
message that is past its deadline, or in a relay. Each exit is one atomic step in the store, and only then is the
broker's copy acknowledged: a crash between the two duplicates a delivery, which the next claim recognises.

A store that does not answer is waited for with backoff, up to ``patience``; then StoreUnavailable leaves the gate and
the delivery goes back to the broker, unsettled.
"""

from __future__ import annotations

import random
import time
import traceback as tracebacks
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar, assert_never

from taskguard import errors
from taskguard.clock import Clock, wall_clock
from taskguard.custody import (
    Buried,
    Claim,
    Claimed,
    Completed,
    Conflict,
    Dropped,
    Hold,
    InProgress,
    Poisoned,
    ResultEntry,
    Superseded,
)
from taskguard.envelope import Envelope
from taskguard.events import Event, Observer
from taskguard.headers import next_attempt
from taskguard.ports import MessageStore
from taskguard.record import Attempt, Failure, Reason, brief
from taskguard.settings import Settings
from taskguard.settlement import Completed as Done
from taskguard.settlement import DeadLettered, Deferred, Discarded, Drop, Replayed, Retried, Settlement

OnDuplicate = Literal["wait", "drop", "raise"]
OnExpired = Literal["dead_letter", "discard"]
Outcome = TypeVar("Outcome")

WAIT_FALLBACK = 30.0
"""Seconds after which a waiting duplicate looks again, should its wake-up be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a task declares that the gate must know."""

    max_crashes: int
    retention: float
    on_duplicate: OnDuplicate = "wait"
    on_expired: OnExpired = "dead_letter"
    release_unique: Literal["start", "success"] | None = None


@dataclass(slots=True)
class Custody:
    """A run in custody, as the task sees it: ``self.custody``.

    token: grows with every claim of the key; hand it to whatever must refuse a run that lost its lease.
    crashes: how many earlier runs of this message ended without an outcome.
    """

    envelope: Envelope
    namespace: str
    holder: str
    token: int = 0
    crashes: int = 0
    terms: Terms | None = None
    lost: bool = field(default=False)

    @property
    def key(self) -> str:
        """The execution key: the same for every attempt and every duplicate; made for ``Idempotency-Key`` headers."""
        return f"{self.namespace}:{self.envelope.task}:{self.envelope.key}"

    @property
    def attempt(self) -> int:
        """Which run this is, from 1: retries and crashes before it, and itself."""
        return self.envelope.retries + self.crashes + 1


class Gate:
    """The way in and the ways out, over one store."""

    def __init__(
        self,
        store: MessageStore,
        settings: Settings,
        *,
        notify: Observer,
        patience: float | None = None,
        clock: Clock = wall_clock,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store = store
        self._settings = settings
        self._notify = notify
        self._patience = settings.patience if patience is None else patience
        self._clock = clock
        self._sleep = sleep

    def enter(
        self,
        envelope: Envelope,
        terms: Terms,
        *,
        holder: str,
        through: Callable[[Callable[[], Claim]], Claim] | None = None,
    ) -> Custody | Settlement:
        """Take custody, or say how the delivery is settled instead. Raises StoreUnavailable after ``patience``.

        *through*: claims as it is told, and has the store do more in the same step.
        """
        settings = self._settings
        asked = 0

        def claim() -> Claim:
            nonlocal asked
            asked += 1
            alone = partial(self._claim, envelope, terms, holder)
            return alone() if through is None else through(alone)

        answer = self._patiently(claim)
        if isinstance(answer, Claimed) and answer.repeated and asked == 1:
            # No reply was lost. A child died before its parent had read its sign of life, and the pool has handed the
            # message to this one as if nothing had been: that was a crash all the same.
            hold, worker = Hold(envelope.id, holder), holder.partition("/")[0]
            unseen = Attempt(at=self._clock(), worker=worker, outcome="crash", error="child lost unseen")
            self._patiently(lambda: self.store.crash(hold, envelope, attempt=unseen))
            answer = self._patiently(claim)
        match answer:
            case Claimed(token, crashes):
                custody = Custody(envelope, settings.namespace, holder, token, crashes, terms)
                if crashes:
                    self._tell(envelope, "rescued", f"{crashes} runs ended without an outcome")
                if terms.release_unique == "start":
                    self._release_name(envelope, terms)
                if envelope.deadline_at is not None and envelope.deadline_at <= self._clock():
                    return self.expire(custody)
                return custody
            case Poisoned(token, crashes):
                custody = Custody(envelope, settings.namespace, holder, token, crashes, terms)
                lost = errors.PoisonedTask(
                    f"{envelope.task} took its worker process down {crashes} times; mend it and requeue the dead letter"
                )
                return self.bury(custody, Reason.POISON, lost)
            case Completed(result):
                self._release_name(envelope, terms)
                return self._told(envelope, Replayed(result), "replayed")
            case InProgress(same_message=True):
                return self._told(envelope, Discarded(Drop.IN_CUSTODY), "discarded", Drop.IN_CUSTODY)
            case InProgress(_, holder_task_id, retry_after):
                return self._duplicate(envelope, terms, holder_task_id, retry_after)
            case Superseded():
                return self._told(envelope, Discarded(Drop.SUPERSEDED), "discarded", Drop.SUPERSEDED)
            case Conflict(holder_task_id):
                reused = errors.KeyReused(
                    f"idempotency key {envelope.key!r} of {envelope.task} belongs to task {holder_task_id} with other "
                    "arguments; send it with a key of its own, or edit the dead letter"
                )
                failure = Failure.of(Reason.KEY_REUSED, reused)
                self._release_name(envelope, terms)
                self._patiently(lambda: self.store.bury_message(envelope, failure=failure))
                return self._told(envelope, DeadLettered(failure, reused), "dead_lettered", Reason.KEY_REUSED)
            case Buried(failure):
                return self._told(envelope, DeadLettered(failure), "replayed")
            case Dropped(reason):
                self._release_name(envelope, terms)
                return self._told(envelope, Discarded(Drop(reason)), "discarded", reason)
            case _:
                assert_never(answer)

    def _duplicate(self, envelope: Envelope, terms: Terms, holder_task_id: str, retry_after: float) -> Settlement:
        same_task = holder_task_id == envelope.task_id
        if terms.on_duplicate == "wait" or same_task:
            due_at = self._clock() + max(retry_after, WAIT_FALLBACK)
            self._patiently(lambda: self.store.schedule(envelope, due_at=due_at, waits_on=envelope.id))
            return self._told(envelope, Deferred(due_at, f"waits for {holder_task_id}"), "deferred", "duplicate")
        message = f"idempotency key {envelope.key!r} of {envelope.task} is held by task {holder_task_id}"
        error = errors.DuplicateTask(message) if terms.on_duplicate == "raise" else None
        return self._told(envelope, Discarded(Drop.DUPLICATE, error), "discarded", Drop.DUPLICATE)

    def complete(
        self,
        custody: Custody,
        value: object,
        *,
        result: bytes,
        entry: ResultEntry | None = None,
        step: Callable[[], bool] | None = None,
    ) -> Settlement:
        """The body returned. The result is kept for duplicates, and told to the result backend, in one step.

        *step*: the same in the run's own transaction, which it commits.
        """
        id, retention = custody.envelope.id, _terms(custody).retention
        return self._exit(
            custody,
            step or (lambda: self.store.complete(id, custody.token, result=result, retention=retention, entry=entry)),
            Done(value),
            "completed",
            repeatable=step is None,
        )

    def retry(self, custody: Custody, following: Envelope, *, due_at: float, error: BaseException | None) -> Settlement:
        """Another attempt rests until *due_at*; one that could only start past its deadline is buried now."""
        deadline = following.deadline_at
        if deadline is not None and due_at >= deadline:
            return self.expire(custody, error)
        attempt = self._attempt(custody.holder, "retry", error)
        return self._exit(
            custody,
            lambda: self.store.rest(custody.envelope.id, custody.token, following, due_at=due_at, attempt=attempt),
            Retried(due_at, error),
            "retried",
            _brief(error),
        )

    def defer(self, custody: Custody, following: Envelope, *, due_at: float, why: str) -> Settlement:
        """The same attempt rests until *due_at*."""
        attempt = self.deferral(custody.holder)
        return self._exit(
            custody,
            lambda: self.store.rest(custody.envelope.id, custody.token, following, due_at=due_at, attempt=attempt),
            Deferred(due_at, why),
            "deferred",
            why,
        )

    def deferral(self, holder: str) -> Attempt:
        """The line in a message's history of a run that *holder* defers."""
        return self._attempt(holder, "defer", None)

    def deferred(self, custody: Custody, *, due_at: float, why: str) -> Settlement:
        """The store has deferred the run already, in the step that gave it custody."""
        return self._told(custody.envelope, Deferred(due_at, why), "deferred", why)

    def again(self, custody: Custody, *, why: str) -> Settlement:
        """The same attempt once more, due at once."""
        following = next_attempt(custody.envelope, retries=custody.envelope.retries)
        return self.defer(custody, following, due_at=self._clock(), why=why)

    def bury(self, custody: Custody, reason: Reason, error: BaseException) -> Settlement:
        """The run failed for good."""
        text = "".join(tracebacks.format_exception(error)) if error.__traceback__ is not None else ""
        failure = Failure.of(reason, error, traceback=text)
        attempt = self._attempt(custody.holder, "dead", error)
        return self._exit(
            custody,
            lambda: self.store.bury(custody.envelope.id, custody.token, failure=failure, attempt=attempt),
            DeadLettered(failure, error),
            "dead_lettered",
            reason,
        )

    def expire(self, custody: Custody, cause: BaseException | None = None, *, why: str = "") -> Settlement:
        """The deadline passed: a dead letter, or discarded, as the task declared. *why* says what came too late."""
        deadline = custody.envelope.deadline_at or 0.0
        if _terms(custody).on_expired == "discard":
            return self.discard(custody, Drop.EXPIRED)
        what = (
            f"the deadline passed {max(0.0, self._clock() - deadline):.1f} s ago"
            if deadline <= self._clock()
            else "the next attempt would start after the deadline"
        )
        late = errors.DeadlineExceeded(f"{custody.envelope.task}: {what}{f'; {why}' if why else ''}")
        late.__cause__ = cause
        return self.bury(custody, Reason.EXPIRED, late)

    def discard(self, custody: Custody, why: Drop, *, step: Callable[[], bool] | None = None) -> Settlement:
        """The run ended without an effect that counts. *step*: as for `complete`."""
        retention = _terms(custody).retention
        return self._exit(
            custody,
            step or (lambda: self.store.discard(custody.envelope.id, custody.token, reason=why, retention=retention)),
            Discarded(why),
            "discarded",
            why,
            repeatable=step is None,
        )

    def crash(self, custody: Custody, error: BaseException) -> Settlement:
        """The run took its process down, or tried to: counted, and due at once."""
        hold = Hold(custody.envelope.id, custody.holder)
        attempt = self._attempt(custody.holder, "crash", error)
        return self._exit(
            custody,
            lambda: self.store.crash(hold, custody.envelope, attempt=attempt),
            Retried(self._clock(), error),
            "crash",
            _brief(error),
        )

    def holds(self, custody: Custody) -> bool:
        """Whether the run still has custody; remembered once it is lost."""
        if not custody.lost and custody.token:
            custody.lost = not self.store.holds(custody.envelope.id, custody.token)
        return not custody.lost

    def _exit(
        self,
        custody: Custody,
        step: Callable[[], bool],
        settlement: Settlement,
        name: str,
        detail: str = "",
        *,
        repeatable: bool = True,
    ) -> Settlement:
        done = self._patiently(step)
        if not done and self._reclaimed(custody):
            if not repeatable:
                return self.again(custody, why="the store had forgotten the run, and its transaction was undone")
            done = self._patiently(step)
        if not done:
            custody.lost = True
            return self._told(custody.envelope, Discarded(Drop.CUSTODY_LOST), "custody_lost")
        if not isinstance(settlement, (Retried, Deferred)):
            self._release_name(custody.envelope, _terms(custody))
        return self._told(custody.envelope, settlement, name, detail)

    def _claim(self, envelope: Envelope, terms: Terms, holder: str) -> Claim:
        return self.store.claim(envelope, holder=holder, lease=self._settings.lease, max_crashes=terms.max_crashes)

    def _reclaimed(self, custody: Custody) -> bool:
        """Whether the store had forgotten the run, which has custody anew: a server that crashes may lose its last
        moment, and the broker's copy, acknowledged now, would be the last trace of the message.

        Not where the record may be gone because another run has ended and its result was kept no longer.
        """
        terms = _terms(custody)
        if self._patiently(lambda: self.store.find(custody.envelope.id)) is not None:
            return False
        if self._patiently(self.store.now) - custody.token / 1000 >= self._settings.lease + terms.retention:
            return False
        answer = self._patiently(lambda: self._claim(custody.envelope, terms, custody.holder))
        if not isinstance(answer, Claimed):
            return False
        custody.token, custody.lost = answer.token, False
        self._tell(custody.envelope, "reclaimed", "the store had forgotten the run")
        return True

    def _release_name(self, envelope: Envelope, terms: Terms) -> None:
        """Let the unique name go that was held while the task was queued or running."""
        if terms.release_unique is not None:
            self._patiently(lambda: self.store.release_unique(envelope.id, envelope.task_id))

    def _attempt(self, holder: str, outcome: str, error: BaseException | None) -> Attempt:
        worker = holder.partition("/")[0]
        return Attempt(at=self._clock(), worker=worker, outcome=outcome, error=_brief(error))

    def _told(self, envelope: Envelope, settlement: Settlement, name: str, detail: str = "") -> Settlement:
        self._tell(envelope, name, detail)
        return settlement

    def _tell(self, envelope: Envelope, name: str, detail: str) -> None:
        self._notify(
            Event(name=name, task=envelope.task, task_id=envelope.task_id, key=envelope.key, detail=str(detail))
        )

    def _patiently(self, step: Callable[[], Outcome]) -> Outcome:
        """Call the store until it answers. Every operation may be repeated, so a lost reply does no harm."""
        waited, pause = 0.0, 0.05
        while True:
            try:
                return step()
            except errors.StoreUnavailable as exc:
                if waited >= self._patience:
                    self._notify(Event(name="store_unavailable", detail=str(exc)))
                    raise
                self._sleep(pause * random.uniform(0.5, 1.5))
                waited += pause
                pause = min(2 * pause, 2.0)


def _terms(custody: Custody) -> Terms:
    if custody.terms is None:
        raise errors.TaskguardError(f"{custody.envelope.task} is not in custody; it was called directly")
    return custody.terms


def _brief(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {brief(error)}" if error is not None else ""
