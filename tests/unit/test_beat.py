"""The scheduler for ``celery beat``: the moments of its entries, and what is sent for them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import copytree
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.beat import BeatLazyFunc
from celery.schedules import crontab
from celery.schedules import schedule as interval
from freezegun import freeze_time

from taskguard import ReliableTask, install
from taskguard.celery.beat import ReliableScheduler, TickEntry, send_tick
from taskguard.celery.runtime import runtime_of
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, StoreUnavailable
from taskguard.events import Event
from taskguard.record import Record, State

NOWHERE = "redis://127.0.0.1:1/0"
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def app(namespace: str) -> Iterator[Celery]:
    """An application without a broker: its ticks rest in the store."""
    app = Celery("shop", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
    install(app, store="memory://", namespace=namespace)

    @app.task(name="report", base=ReliableTask, shared=False)
    def report(*args: object, **kwargs: object) -> None: ...

    yield app
    app.close()


def resting(app: Celery) -> list[Record]:
    """What waits for a relay."""
    return list(app.taskguard.store.scan(State.PENDING))


def entry(app: Celery, schedule: Any, *, last: datetime = NOON, **options: Any) -> TickEntry:
    """An entry that was last sent at *last*."""
    return TickEntry("nightly", "report", last, schedule=schedule, app=app, options=options)


@pytest.mark.parametrize(
    ("schedule", "last", "now", "moment"),
    [
        (interval(30), NOON + timedelta(seconds=7), NOON + timedelta(seconds=31), NOON + timedelta(seconds=30)),
        (interval(30), NOON - timedelta(days=400), NOON + timedelta(seconds=29), NOON),
        (interval(0.5), NOON, NOON + timedelta(seconds=0.7), NOON + timedelta(seconds=0.5)),
        (crontab(), NOON + timedelta(seconds=5), NOON + timedelta(seconds=61), NOON + timedelta(seconds=60)),
        (crontab(), NOON - timedelta(days=3), NOON + timedelta(seconds=1), NOON),
        (crontab(minute="*/7"), NOON - timedelta(hours=5), NOON - timedelta(minutes=1), NOON - timedelta(minutes=4)),
        (crontab(hour="3", minute="*"), NOON - timedelta(days=9), NOON, NOON.replace(hour=3, minute=59)),
        (crontab(hour=0, minute=0, day_of_month=1), NOON - timedelta(days=90), NOON, NOON.replace(hour=0)),
    ],
)
def test_the_moment_of_a_tick_is_the_last_that_has_passed(
    app: Celery, schedule: Any, last: datetime, now: datetime, moment: datetime
) -> None:
    """Whoever works it out, and whenever it was last sent there."""
    with freeze_time(now):
        due = entry(app, schedule, last=last)
        assert due.is_due()[0]
        assert due.tick() == moment


@pytest.mark.parametrize("late", [0.0, 0.01, 12.0, 29.99])
def test_an_interval_has_the_same_moments_whenever_beat_was_started(app: Celery, late: float) -> None:
    """Not a while after its own start: two beats would send in between each other."""
    with freeze_time(NOON + timedelta(seconds=7)):
        fresh = TickEntry("nightly", "report", schedule=interval(30), app=app)
        assert fresh.is_due() == (False, pytest.approx(23))
    with freeze_time(NOON + timedelta(seconds=30 + late)):
        due, wait = fresh.is_due()
        assert due
        assert wait == pytest.approx(30 - late, abs=1e-3)
        assert not next(fresh).is_due()[0]


@pytest.mark.parametrize(
    ("zone", "midnight"),
    [
        ("Europe/Berlin", datetime(2026, 3, 28, tzinfo=UTC)),
        ("Europe/Berlin", datetime(2026, 10, 24, tzinfo=UTC)),
        ("America/New_York", datetime(2026, 3, 7, tzinfo=UTC)),
        ("UTC", datetime(2026, 3, 28, tzinfo=UTC)),
    ],
)
@pytest.mark.parametrize("period", [86400, 3600 * 6])
def test_an_interval_is_as_long_on_the_day_on_which_the_clock_is_changed(
    app: Celery, zone: str, midnight: datetime, period: int
) -> None:
    """Three days by the half hour: its multiples in UTC, each once, and the wait until the next is right."""
    app.conf.timezone = zone
    now, sent = midnight, []
    every = interval(period, nowfun=lambda: now.astimezone(ZoneInfo(zone)), app=app)  # a frozen clock has no fold
    due = TickEntry("nightly", "report", schedule=every, app=app)
    for half_hours in range(1, 144):
        now = midnight + timedelta(minutes=30) * half_hours
        is_due, wait = due.is_due()
        assert wait == period - half_hours * 1800 % period
        if is_due:
            sent.append(due.tick())
            due = next(due)
    assert sent == [midnight + timedelta(seconds=period) * n for n in range(1, 143 * 1800 // period + 1)]


def test_a_tick_is_sent_once_by_however_many(app: Celery) -> None:
    """Its name and its moment are the key, and the name under which it is left."""
    with freeze_time(NOON + timedelta(seconds=31)):
        for _ in range(3):
            due = entry(app, interval(30))
            send_tick(app, due, due.tick())
    with freeze_time(NOON + timedelta(seconds=62)):
        due = entry(app, interval(30))
        result = send_tick(app, due, due.tick())
    assert [record.key for record in resting(app)] == [
        "nightly@2026-03-01T12:00:30+00:00",
        "nightly@2026-03-01T12:01:00+00:00",
    ]
    assert resting(app)[-1].task_id == result.id


def test_arguments_and_options_are_the_entry_s(app: Celery) -> None:
    """Values that are made when they are sent, and a key of one's own."""
    with freeze_time(NOON + timedelta(seconds=31)):
        due = TickEntry(
            "nightly", "report", NOON, schedule=interval(30), args=(1, BeatLazyFunc(lambda: 2)), kwargs={"three": 3},
            options={"idempotency_key": "mine", "queue": "slow"}, app=app,
        )  # fmt: skip
        send_tick(app, due, due.tick())
        [record] = resting(app)
    assert (record.key, record.queue) == ("mine", "slow")
    assert b"[[1, 2], {" in (record.wire or b"").replace(b"\\", b"")
    assert dict(due.options) == {"idempotency_key": "mine", "queue": "slow"}, "the entry is sent again"


def test_a_task_that_is_not_known_here_is_sent_by_name(app: Celery) -> None:
    """As Celery does."""
    with freeze_time(NOON + timedelta(seconds=31)):
        due = TickEntry("nightly", "elsewhere", NOON, schedule=interval(30), app=app)
        send_tick(app, due, due.tick())
        assert [record.task for record in resting(app)] == ["elsewhere"]


@pytest.mark.parametrize(("late", "sent"), [(9.9, 1), (10.0, 0), (1000.0, 0)])
def test_a_late_tick_is_dropped_at_its_deadline(app: Celery, late: float, sent: int) -> None:
    """It counts from the tick, and goes along with what was sent in time."""
    events: list[Event] = []
    app.taskguard.observers.add(events.append)
    with freeze_time(NOON + timedelta(seconds=3600 + late)):
        due = entry(app, interval(3600), deadline=10)
        send_tick(app, due, due.tick())
        found = resting(app)
    assert len(found) == sent
    assert [event.name for event in events] == ["discarded"] * (1 - sent)
    if found:
        carried = Envelope.from_wire(found[0].wire or b"")
        assert carried.deadline_at == (NOON + timedelta(seconds=3610)).timestamp()


def test_a_tick_that_the_store_did_not_take_is_tried_again(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not forgotten, though its successor comes meanwhile; no broker is needed."""
    app.conf.beat_schedule = {"nightly": {"task": "report", "schedule": 30}}
    store = runtime_of(app).store
    schedule = store.schedule

    def away(*_: Any, **__: Any) -> str:
        raise StoreUnavailable("away")

    with freeze_time(NOON + timedelta(seconds=1)) as clock:
        scheduler = ReliableScheduler(app, schedule_filename=str(tmp_path / "schedule"))
        scheduler.tick()
        clock.move_to(NOON + timedelta(seconds=30, milliseconds=1))
        monkeypatch.setattr(store, "schedule", away)
        while scheduler.tick() == 0:
            pass
        assert resting(app) == []
        assert scheduler.tick() <= 1.0
        monkeypatch.setattr(store, "schedule", schedule)
        clock.tick(1.0)
        scheduler.tick()
        assert [record.key for record in resting(app)] == ["nightly@2026-03-01T12:00:30+00:00"]
        scheduler.tick()
        assert len(resting(app)) == 1
        scheduler.close()


@pytest.mark.parametrize("ends", ["closed", "killed"])
@pytest.mark.parametrize("schedule", [30, crontab()])
def test_a_tick_that_the_store_did_not_take_is_made_up_by_the_next_beat(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Any, ends: str
) -> None:
    """One that is started again on the same file, however it ended; and what was taken is not sent again."""
    app.conf.beat_schedule = {"nightly": {"task": "report", "schedule": schedule}}
    store = runtime_of(app).store
    taken = store.schedule

    def away(*_: Any, **__: Any) -> str:
        raise StoreUnavailable("away")

    def started(name: str) -> ReliableScheduler:
        return ReliableScheduler(app, schedule_filename=str(tmp_path / name / "schedule"))

    (tmp_path / "first").mkdir()
    with freeze_time(NOON + timedelta(seconds=1)) as clock:
        scheduler = started("first")
        scheduler.tick()
        clock.move_to(NOON + timedelta(seconds=60, milliseconds=20))
        monkeypatch.setattr(store, "schedule", away)
        while scheduler.tick() == 0:
            pass
        if ends == "killed":
            scheduler.sync()
            copytree(tmp_path / "first", tmp_path / "second")
        scheduler.close()
        if ends == "closed":
            copytree(tmp_path / "first", tmp_path / "second")
        monkeypatch.setattr(store, "schedule", taken)
        clock.tick(10.0)
        for name in ("second", "second", "first"):
            scheduler = started(name)
            while scheduler.tick() == 0:
                pass
            scheduler.close()
            assert [record.key for record in resting(app)] == ["nightly@2026-03-01T12:01:00+00:00"]


def test_a_tick_that_was_taken_late_is_done_with(app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says so: the next beat does not even try."""
    app.conf.beat_schedule = {"nightly": {"task": "report", "schedule": 30}}
    store = runtime_of(app).store
    taken, tries = store.schedule, []

    def away_once(*args: Any, **options: Any) -> str:
        tries.append(1)
        if len(tries) == 1:
            raise StoreUnavailable("away")
        return str(taken(*args, **options))

    monkeypatch.setattr(store, "schedule", away_once)
    with freeze_time(NOON + timedelta(seconds=1)) as clock:
        for at in (2, 31, 33, 35):
            clock.move_to(NOON + timedelta(seconds=at))
            scheduler = ReliableScheduler(app, schedule_filename=str(tmp_path / "schedule"))
            while scheduler.tick() == 0:
                pass
            scheduler.close()
    assert len(tries) == 2
    assert [record.key for record in resting(app)] == ["nightly@2026-03-01T12:00:30+00:00"]


def test_without_a_store_it_does_not_start(tmp_path: Path) -> None:
    """Ticks would have no place to be."""
    app = Celery("shop", broker=NOWHERE, set_as_current=False)
    install(app)
    with pytest.raises(ConfigurationError, match="ticks are left in the store and none is configured"):
        ReliableScheduler(app, schedule_filename=str(tmp_path / "schedule"))
