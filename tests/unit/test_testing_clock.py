"""The kit's clock: it stands still, and drives deadlines, delays, retries and retention when it is moved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from celery import Celery
from freezegun import freeze_time

from taskguard import Budget, ReliableTask, Retry
from taskguard.clock import wall_clock
from taskguard.record import Reason
from taskguard.testing import ManualClock, Reliable
from tests.unit.rehearsal import add, declare, make_app, noting


@pytest.fixture
def app() -> Celery:
    """An application as it is in production: its servers are elsewhere."""
    return make_app()


@pytest.fixture
def reliable(app: Celery) -> Iterator[Reliable]:
    """The application on stage."""
    with Reliable(app) as reliable:
        yield reliable


def test_what_is_delayed_waits_for_the_clock(app: Celery, reliable: Reliable) -> None:
    """Celery's countdown and eta are counted on the test's clock; `advance` runs nothing by itself."""
    task = declare(app, add)
    start = reliable.clock()
    later, latest = task.apply_async((1,), countdown=30), task.apply_async((2,), countdown=90)
    soon = task.apply_async((0,), eta=datetime.fromtimestamp(start, UTC) + timedelta(seconds=5))
    reliable.drain()
    assert [(message.task_id, message.due_at) for message in reliable.waiting] == [
        (soon.id, start + 5),
        (later.id, start + 30),
        (latest.id, start + 90),
    ]
    reliable.advance("30s")
    assert (later.state, reliable.drain(), later.get()) == ("PENDING", 2, 1)
    assert (latest.state, reliable.clock()) == ("PENDING", start + 30)
    assert reliable.drain(until=3600) == 1
    assert (latest.get(), reliable.clock()) == (2, start + 3630)


def test_what_is_due_at_one_instant_runs_in_the_order_it_was_sent(app: Celery, reliable: Reliable) -> None:
    """A test that passes once passes always."""
    ran: list[int] = []
    task = declare(app, noting(ran))
    for n in range(20):
        task.apply_async((n,), countdown=60)
    assert [message.args[0] for message in reliable.waiting] == list(range(20))
    reliable.drain(until="1m")
    assert ran == list(range(20))


def test_each_message_runs_at_the_instant_it_is_due(app: Celery, reliable: Reliable) -> None:
    """Moving on by an hour is not the same as running everything an hour late."""
    ran: list[float] = []
    start = reliable.clock()

    @declare(app, bind=True)
    def flaky(self: ReliableTask) -> None:
        ran.append(wall_clock() - start)
        if len(ran) < 3:
            raise self.retry(countdown=100)

    flaky.delay()
    reliable.drain(until=datetime.fromtimestamp(start + 3600, UTC))
    assert ran == [0, 100, 200]
    assert reliable.clock() == start + 3600


def test_retries_of_a_policy_are_paced_by_the_clock(app: Celery, reliable: Reliable) -> None:
    """Until they are used up; then there is a dead letter, with every attempt."""

    @declare(app, retry=Retry(max_retries=3, first_delay=10, jitter="none"))
    def calling() -> None:
        raise ConnectionError("bank down")

    start = reliable.clock()
    calling.delay()
    reliable.drain(until="idle")
    (letter,) = reliable.dead_letters
    assert [round(attempt.at - start) for attempt in letter.attempts] == [0, 10, 30, 70]


def test_a_retry_budget_is_counted_on_the_clock_and_anew_in_each_test(app: Celery) -> None:
    """What one test has spent is not missing in the next."""
    policy = Retry(max_retries=9, first_delay=0.1, jitter="none", budget=Budget(ratio=0, min_per_second=0.1, window=10))

    @declare(app, retry=policy)
    def calling() -> None:
        raise ConnectionError("bank down")

    for _ in range(2):
        with Reliable(app) as reliable:
            calling.delay()
            reliable.drain(until=5)
            assert [len(letter.attempts) for letter in reliable.dead_letters] == [2]


def test_work_that_is_late_does_not_start(app: Celery, reliable: Reliable) -> None:
    """Deadlines, and Celery's ``expires``, are read from the clock."""
    task = declare(app, add)
    late, expired, fine = task.apply_async((1,), deadline=60), task.apply_async((2,), expires=60), task.delay(3)
    reliable.advance(61)
    reliable.drain()
    assert [result.state for result in (late, expired, fine)] == ["FAILURE", "FAILURE", "SUCCESS"]
    assert {letter.failure.reason for letter in reliable.dead_letters} == {Reason.EXPIRED}


def test_a_result_is_forgotten_after_its_retention(app: Celery, reliable: Reliable) -> None:
    """Within it a duplicate is answered from the store; after it the key is free."""
    ran: list[int] = []
    task = declare(app, noting(ran), idempotency_key="the-key", retention="1h")
    task.delay(1)
    reliable.drain()
    reliable.advance("59m")
    task.delay(1)
    reliable.drain()
    assert ran == [1]
    reliable.advance("1m")
    task.delay(1)
    reliable.drain()
    assert ran == [1, 1]


def test_frozen_time_can_be_the_clock(app: Celery) -> None:
    """With freezegun the task's own look at the time moves, too."""
    seen: list[float] = []

    @declare(app)
    def task() -> None:
        seen.append(time.time())

    with freeze_time("2026-01-02 03:04:05") as frozen, Reliable(app) as reliable:
        reliable.clock.follow(frozen)
        start = time.time()
        task.apply_async(countdown=0.1)
        task.apply_async(countdown=3600)
        reliable.drain(until="idle")
        assert [round(at - start, 3) for at in seen] == [0.1, 3600]
        reliable.advance(10)
        assert time.time() - start == pytest.approx(3610, abs=0.001)


def test_a_manual_clock_never_goes_back() -> None:
    """It begins now, at a whole second."""
    before = time.time()
    clock = ManualClock()
    assert before <= clock() <= time.time() + 1
    assert clock().is_integer()
    assert ManualClock(5.0).advance("1m") == 65.0
    at = clock()
    clock.move_to(at - 100)
    assert clock() == at
