"""The life of a message as pure functions: the specification every store follows.

Each takes the record as it is (None where there is none) and the instant, and returns the record as it must be (None
to delete it), with an answer where one is due. The memory and SQL stores run these functions under a lock; the Redis
store runs their Lua translation; one contract suite holds them equal. A stale token or holder changes nothing: the
same record object comes back, which stores read as "refused".
"""

from __future__ import annotations

from dataclasses import replace

from taskguard.clock import to_ms
from taskguard.custody import Buried, Claim, Claimed, Completed, Conflict, Dropped, InProgress, Poisoned, Superseded
from taskguard.envelope import Envelope, record_id
from taskguard.record import Attempt, Failure, Record, State, append_history

PUBLISHED_RETENTION = 7 * 86400.0
"""Seconds a published message's crash count is remembered while it waits in the broker."""

TERMINAL = frozenset({State.DONE, State.DEAD, State.DISCARDED})


def claim(
    record: Record | None, envelope: Envelope, *, holder: str, lease: float, max_crashes: int, now: float
) -> tuple[Record, Claim]:
    """Ask for custody. Where it would be given, the store first asks whether the task id was revoked."""
    if record is None or (record.expires_at is not None and record.expires_at <= now):
        return _take(None, envelope, holder=holder, lease=lease, max_crashes=max_crashes, now=now)
    same = record.task_id == envelope.task_id
    if not same and record.state is not State.DEAD and record.state is not State.DISCARDED:
        if record.fingerprint != envelope.fingerprint:
            return record, Conflict(record.task_id)
        if record.state is State.DONE:
            return record, Completed(record.result or b"")
        return record, InProgress(False, record.task_id, max(0.0, (record.due_at or now) - now))
    ended = record.due_at is not None and record.due_at <= now
    match record.state:
        case State.DONE:
            return record, Completed(record.result or b"")
        case State.DEAD if same and envelope.sequence <= record.sequence:
            return record, Buried(Failure.from_json(record.failure))
        case State.DISCARDED if same and envelope.sequence <= record.sequence:
            return record, Dropped(record.failure)
        case State.DEAD | State.DISCARDED:
            # Another life of the key begins; only the token goes on, so that a run of the former one stays fenced.
            reborn = replace(fresh(envelope, primary=True, now=now), token=record.token)
            return _take(reborn, envelope, holder=holder, lease=lease, max_crashes=max_crashes, now=now)
        case _ if envelope.sequence < record.sequence:
            return record, Superseded()
        case State.RUNNING if record.holder == holder:
            return record, Claimed(record.token, record.crashes, record.history, repeated=True)
        case State.RUNNING if not ended:
            same_attempt = envelope.sequence == record.sequence
            return record, InProgress(same_attempt, record.task_id, (record.due_at or now) - now)
        case State.RUNNING:
            record = crashed(record, now=now)
    return _take(record, envelope, holder=holder, lease=lease, max_crashes=max_crashes, now=now)


def _take(
    record: Record | None, envelope: Envelope, *, holder: str, lease: float, max_crashes: int, now: float
) -> tuple[Record, Claim]:
    base = record or fresh(envelope, primary=True, now=now)
    taken = replace(
        base,
        task_id=envelope.task_id,
        state=State.RUNNING,
        sequence=envelope.sequence,
        fingerprint=envelope.fingerprint,
        queue=envelope.queue,
        token=max(base.token + 1, to_ms(now)),
        holder=holder,
        lease="",
        kept=False,
        due_at=now + lease,
        expires_at=None,
        wire=base.wire if record is None else envelope.to_wire(),
        updated_at=now,
    )
    answer = Poisoned if taken.crashes >= max_crashes else Claimed
    return taken, answer(taken.token, taken.crashes, taken.history)


def displaced(record: Record | None, envelope: Envelope) -> Record | None:
    """The dead letter that a claim by another message would overwrite, under the id it must be kept by instead."""
    if record is None or record.state is not State.DEAD or record.task_id == envelope.task_id:
        return None
    return replace(record, id=record_id(record.task, record.key, record.task_id), primary=False)


def fresh(envelope: Envelope, *, primary: bool, now: float) -> Record:
    """A record for a message never seen before."""
    return Record(
        id=envelope.id if primary else envelope.copy_id,
        task=envelope.task,
        task_id=envelope.task_id,
        key=envelope.key,
        state=State.PENDING,
        primary=primary,
        sequence=envelope.sequence,
        fingerprint=envelope.fingerprint,
        queue=envelope.queue,
        wire=envelope.to_wire(),
        created_at=now,
        updated_at=now,
    )


def scheduled(envelope: Envelope, *, due_at: float, waits_on: str, lease: str, now: float) -> Record:
    """A message that rests beside its key's record until it is due, or until the record it waits on ends."""
    return replace(fresh(envelope, primary=False, now=now), due_at=due_at, waits_on=waits_on, lease=lease)


def leased_to_another(record: Record, lease: str) -> bool:
    """Whether a relay may be publishing this copy. It came back to rest since: without a new write the relay's removal
    would take the only copy."""
    return record.state is State.PENDING and record.lease not in ("", lease)


def buried(envelope: Envelope, *, failure: Failure, history: str, now: float) -> Record:
    """A dead letter for a message that was never claimed."""
    letter = fresh(envelope, primary=False, now=now)
    return replace(letter, state=State.DEAD, failure=failure.to_json(), history=history)


def owned(record: Record | None, token: int) -> bool:
    """Whether *token* still holds the run."""
    return record is not None and record.state is State.RUNNING and record.token == token


def renew(record: Record | None, holder: str, *, lease: float, now: float, keep: bool) -> Record | None:
    """Prolong the run's lease; with *keep* the record becomes the only copy of the message.

    A lease that ended but was not taken over is still the holder's.
    """
    if record is None or record.state is not State.RUNNING or record.holder != holder:
        return record
    return replace(record, due_at=now + lease, kept=record.kept or keep)


def complete(record: Record, *, result: bytes, retention: float, now: float) -> Record:
    """The run succeeded; its result is kept for its duplicates."""
    return _end(replace(record, state=State.DONE, result=result), retention=retention, now=now)


def discard(record: Record, *, reason: str, retention: float, now: float) -> Record:
    """The run ended without an effect: revoked, expired, a duplicate. ``failure`` holds the reason."""
    return _end(replace(record, state=State.DISCARDED, failure=reason), retention=retention, now=now)


def bury(record: Record, *, failure: Failure, attempt: Attempt | None, now: float) -> Record:
    """The run failed for good."""
    history = append_history(record.history, attempt)
    return _end(replace(record, state=State.DEAD, failure=failure.to_json(), history=history), retention=None, now=now)


def _end(record: Record, *, retention: float | None, now: float) -> Record:
    stays = record.kept
    return replace(
        record,
        holder=record.holder if stays else "",
        due_at=record.due_at if stays else None,
        wire=record.wire if stays or record.state is State.DEAD else None,
        expires_at=None if retention is None else (record.due_at if stays and record.due_at else now) + retention,
        updated_at=now,
    )


def finish(record: Record | None, holder: str, *, now: float) -> Record | None:
    """Celery has done all that follows the outcome (links, result, acknowledgement): let the kept message go."""
    if record is None or record.state not in TERMINAL or not record.kept or record.holder != holder:
        return record
    return _let_go(record)


def _let_go(record: Record) -> Record:
    return replace(
        record,
        holder="",
        lease="",
        kept=False,
        due_at=None,
        wire=record.wire if record.state is State.DEAD else None,
    )


def rest(record: Record, envelope: Envelope, *, due_at: float, attempt: Attempt | None, now: float) -> Record:
    """From a run to a message at rest: a retry, or a deferral. *envelope* is the next delivery."""
    return replace(
        record,
        state=State.PENDING,
        sequence=envelope.sequence,
        fingerprint=envelope.fingerprint,
        queue=envelope.queue,
        holder="",
        lease="",
        kept=False,
        due_at=due_at,
        expires_at=None,
        wire=envelope.to_wire(),
        history=append_history(record.history, attempt),
        updated_at=now,
    )


def awaits(record: Record, envelope: Envelope) -> bool:
    """Whether the record was published and waits for just this message to be claimed."""
    published = record.state is State.PUBLISHED
    return published and record.task_id == envelope.task_id and record.sequence == envelope.sequence


def crashed(record: Record, *, now: float, attempt: Attempt | None = None) -> Record:
    """The run ended without an outcome: the message is due again, the crash is counted, its token is void."""
    if attempt is None:
        attempt = Attempt(at=now, worker=record.holder, outcome="crash", error="lease ended")
    return replace(
        record,
        state=State.PENDING,
        crashes=record.crashes + 1,
        token=record.token + 1,
        lease="",
        holder="",
        kept=False,
        due_at=now,
        history=append_history(record.history, attempt),
        updated_at=now,
    )


def lease_out(record: Record, lease: str, *, seconds: float, now: float) -> Record:
    """A relay takes a due message to publish it. A run whose lease ended is counted as crashed."""
    if record.state is State.RUNNING:
        record = crashed(record, now=now)
    return replace(record, lease=lease, due_at=now + seconds)


def remove(record: Record | None, lease: str, *, now: float) -> Record | None:
    """The broker has confirmed the message. A newer write has voided the lease: then nothing changes."""
    if record is None or not lease or record.lease != lease:
        return record
    if record.state in TERMINAL:
        return _let_go(record)
    if not record.primary:
        return None
    return replace(
        record,
        state=State.PUBLISHED,
        lease="",
        due_at=None,
        wire=None,
        expires_at=now + PUBLISHED_RETENTION,
        updated_at=now,
    )


def requeue(record: Record, envelope: Envelope, *, due_at: float, now: float) -> Record:
    """An operator's decision: the dead letter is due again with all its chances back; its history stays."""
    attempt = Attempt(at=now, worker="operator", outcome="requeue")
    return replace(rest(record, envelope, due_at=due_at, attempt=attempt, now=now), failure="", crashes=0)


def purge(record: Record, *, retention: float, now: float) -> Record | None:
    """An operator's decision: forget the dead letter. A primary leaves a stone, so that an old copy stays dead."""
    if not record.primary:
        return None
    return discard(replace(record, kept=False), reason="purged", retention=retention, now=now)
