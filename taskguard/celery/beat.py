"""``celery -A shop beat -S taskguard.celery.beat:ReliableScheduler``: each tick of a schedule is sent once.

A tick is an entry and the moment it was due, which every beat works out alike: an interval's moments are its multiples
since 1970, whenever a beat was started, and of moments that were missed the last one counts. A tick is left in the
message store in one step, under a name of its own that the first beat takes; a relay publishes it. So any number of
beats may run at once, and one that was killed may send its last tick again: nothing is sent for it a second time. The
tick is also the task's idempotency key. Beat itself needs no broker.

An entry's option ``deadline`` counts from the tick: past it, a late tick is not sent, and one that was is not started.

It is Celery's own scheduler with its file, because what is at stake is only the sending: who was sent when is known in
the store, and the file says what a beat that was away has missed. Rejected: electing one beat (a lock that may be held
by a beat that hangs), and the last tick of each entry in the store (it would send what is new at once).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from celery.beat import BeatLazyFunc, PersistentScheduler, ScheduleEntry
from celery.schedules import schedule as Interval
from celery.utils.log import get_logger

from taskguard.celery.effects import recorded
from taskguard.celery.publishing import CapturingProducer, capturing
from taskguard.celery.runtime import runtime_of
from taskguard.clock import iso, seconds, wall_clock
from taskguard.custody import Unique
from taskguard.envelope import record_id
from taskguard.errors import ConfigurationError, StoreError
from taskguard.events import Event

logger = get_logger(__name__)

KNOWN = 86400.0
"""Seconds a tick is remembered at least, beyond its successor: no beat's clock is that wrong."""
AGAIN = 1.0
"""Seconds until a tick is tried again that the store did not take."""
_WINDOWS = (timedelta(minutes=1), timedelta(hours=1), timedelta(days=1), timedelta(days=32), timedelta(days=366))


class TickEntry(ScheduleEntry):  # type: ignore[misc]
    """An entry whose interval has the same moments in every process."""

    def is_due(self) -> tuple[bool, float]:
        """See Celery's. Seconds until the next moment come with it."""
        if not _is_interval(self.schedule):
            due, wait = self.schedule.is_due(self.last_run_at)
            return bool(due), float(wait)
        now = self.default_now()
        tick, period = _multiple(self.schedule, now)
        wait = tick + period - _utc(self.schedule, now)
        return tick > _utc(self.schedule, self.last_run_at), wait.total_seconds()

    def tick(self) -> datetime:
        """The moment, in UTC, for which it is due: of several that have passed, the last."""
        now = self.default_now()
        if _is_interval(self.schedule):
            return _multiple(self.schedule, now)[0]
        now, last = _aware(self.schedule, now), self.schedule.maybe_make_aware(self.last_run_at)
        for window in _WINDOWS:
            found = None
            for found in _moments(self.schedule, max(last, now - window), now):  # noqa: B007
                pass
            if found is not None:
                return found.astimezone(UTC)
            if now - window <= last:
                break
        return now.astimezone(UTC).replace(microsecond=0)  # a schedule that says it is due, and not since when


def _is_interval(schedule: Any) -> bool:
    return type(schedule) is Interval and schedule.run_every > timedelta()


def _aware(schedule: Any, at: datetime) -> datetime:
    aware: datetime = schedule.maybe_make_aware(at)
    return aware


def _utc(schedule: Any, at: datetime) -> datetime:
    return _aware(schedule, at).astimezone(UTC)


def _multiple(schedule: Any, at: datetime) -> tuple[datetime, timedelta]:
    """The last multiple of the interval before *at*, in UTC, and the interval.

    A zone's own arithmetic is that of its wall clock: an hour off on the day on which that is put forward or back.
    """
    at, period = _utc(schedule, at), schedule.run_every
    return at - (at - datetime(1970, 1, 1, tzinfo=UTC)) % period, period


def _moments(schedule: Any, after: datetime, until: datetime) -> Iterator[datetime]:
    """The moments between these two, to the second."""
    while True:
        now = _aware(schedule, schedule.now())
        moment = now + schedule.remaining_estimate(after)
        moment = (moment + timedelta(milliseconds=500)).replace(microsecond=0)
        if moment > until or moment <= after:
            return
        yield moment
        after = moment


class ReliableScheduler(PersistentScheduler):  # type: ignore[misc]
    """Celery's scheduler, sending through the store. Raises ConfigurationError where none is configured."""

    Entry = TickEntry
    producer = None
    """Celery would connect to the broker for one."""

    def __init__(self, app: Any, *args: Any, **options: Any) -> None:
        self._unsent: dict[str, tuple[TickEntry, datetime]] = {}
        if runtime_of(app).settings.store is None:
            raise ConfigurationError(
                "ReliableScheduler: ticks are left in the store and none is configured; set TASKGUARD_STORE, "
                "taskguard_store or taskguard.install(app, store=...)"
            )
        super().__init__(app, *args, **options)

    def tick(self, *args: Any, **options: Any) -> float:
        """Send what is due, and first what the store did not take before."""
        for entry, moment in list(self._unsent.values()):
            self._try(entry, moment)
        wait = float(super().tick(*args, **options))
        return AGAIN if self._unsent else wait  # 0 would be at once: the store is away, and entries may stay due

    def apply_async(self, entry: Any, producer: Any = None, advance: bool = True, **_: Any) -> Any:
        """See Celery's."""
        moment = entry.tick()
        if advance:
            self.reserve(entry)
        try:
            return self._try(entry, moment)
        finally:
            self._tasks_since_sync += 1
            if self.should_sync():
                self._do_sync()

    def _try(self, entry: TickEntry, moment: datetime) -> Any:
        waited = self._unsent.pop(entry.name, None)
        try:
            result = send_tick(self.app, entry, moment)
        except StoreError as exc:
            self._unsent[entry.name] = (entry, moment)
            self._last_run(entry, entry.last_run_at)  # what the file is to say to a beat that is started again
            logger.error("beat: %s of %s is tried again: %s", entry.name, iso(moment.timestamp()), exc)
            return None
        if waited == (entry, moment):
            self._last_run(entry, moment)
        return result

    def _last_run(self, entry: TickEntry, at: datetime) -> None:
        known = self.schedule.get(entry.name)
        if known is not None:
            known.last_run_at = at


def send_tick(app: Any, entry: Any, moment: datetime) -> Any:
    """Leave the entry's task of this moment in the store. None: another beat has, or it is too late.

    Raises StoreError; it may be repeated.
    """
    runtime, at = runtime_of(app), moment.timestamp()
    options: dict[str, Any] = dict(entry.options)
    options["headers"] = {**(options.get("headers") or {}), "celery_beat_task": True}
    options.setdefault("idempotency_key", f"{entry.name}@{moment.isoformat()}")
    patience = options.pop("deadline", None)
    if patience is not None:
        ends = at + seconds(patience, what=f"beat_schedule: {entry.name}: deadline")
        if wall_clock() >= ends:
            late = f"the tick of {iso(at)} of {entry.name} is late, its deadline was {iso(ends)}"
            runtime.observers(Event(name="discarded", task=entry.task, detail=late))
            return None
        options["deadline"] = datetime.fromtimestamp(ends, UTC)
    with recorded(app), capturing() as capture:
        result = _sent(app, entry, options)
    [envelope], [due_at] = capture.envelopes, capture.dues
    following = entry.schedule.remaining_estimate(_aware(entry.schedule, entry.default_now())).total_seconds()
    unique = Unique(record_id("beat", entry.name, moment.isoformat()), max(0.0, following) + KNOWN)
    holder = runtime.store.schedule(envelope, due_at=due_at or wall_clock(), unique=unique)
    if holder != envelope.task_id:
        logger.debug("beat: %s of %s was sent by another beat", entry.name, iso(at))
        return None
    return result


def _sent(app: Any, entry: Any, options: Mapping[str, Any]) -> Any:
    args = [_value(each) for each in entry.args or ()]
    kwargs = {name: _value(each) for name, each in (entry.kwargs or {}).items()}
    task = app.tasks.get(entry.task)
    if task is None:
        return app.send_task(entry.task, args, kwargs, producer=CapturingProducer(), **options)
    return task.apply_async(args, kwargs, producer=CapturingProducer(), **options)


def _value(given: Any) -> Any:
    return given() if isinstance(given, BeatLazyFunc) else given
