"""The kit for users' own tests: what they send runs when they say so, in their process, on their clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from celery import Celery, Task, chain, chord, group
from celery.exceptions import Reject

from taskguard import ConfigurationError, ReliableTask
from taskguard.clock import wall_clock
from taskguard.record import Reason
from taskguard.testing import Reliable
from tests.unit.rehearsal import NOWHERE, add, declare, make_app, noting


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Celery:
    """An application as it is in production: its servers are elsewhere."""
    monkeypatch.setenv("CELERY_BROKER_URL", NOWHERE)
    return make_app()


@pytest.fixture
def reliable(app: Celery) -> Iterator[Reliable]:
    """The application on stage."""
    with Reliable(app) as reliable:
        yield reliable


def total(numbers: list[int]) -> int:
    """A chord's body."""
    return sum(numbers)


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_what_is_sent_waits_until_it_is_drained(app: Celery, reliable: Reliable) -> None:
    """Nothing runs by itself; the queue shows what was meant, and the result is there afterwards."""
    task = declare(app, add, name="shop.add")
    result = task.apply_async((1,), {"y": 2}, queue="slow")
    (message,) = reliable.queue
    assert (message.task, message.task_id, message.queue) == ("shop.add", result.id, "slow")
    assert (list(message.args), message.kwargs) == ([1], {"y": 2})
    assert result.state == "PENDING"
    assert reliable.drain() == 1
    assert reliable.queue == []
    assert (result.get(), reliable.result(result.id).state) == (3, "SUCCESS")
    assert [event.name for event in reliable.events] == ["completed"]


def test_a_result_that_is_not_there_yet_is_not_waited_for(app: Celery, reliable: Reliable) -> None:
    """Nobody would work meanwhile: one line says what to do."""
    result = declare(app, add).delay(1)
    with pytest.raises(AssertionError, match=rf"task {result.id} has not ended \(PENDING\); call drain\(\) before get"):
        result.get(timeout=60)


@pytest.mark.parametrize("base", [ReliableTask, Task], ids=["reliable", "plain"])
def test_workflows_run_to_their_end(app: Celery, reliable: Reliable, base: type[Task]) -> None:
    """Chains, groups, chords, links, and tasks sent by name, of either class."""
    plus, sums = declare(app, add, base=base, name="plus"), declare(app, total, base=base, name="sums")
    linked = plus.apply_async((1,), link=plus.s(10))
    results = [
        chain(plus.s(1, 2), plus.s(3), plus.s(4)).apply_async(),
        group(plus.s(n, n) for n in range(3)).apply_async(),
        chord([plus.s(1, 1), plus.s(2, 2)])(sums.s()),
        chain(plus.s(1, 1), group(plus.s(1), plus.s(2)), sums.s()).apply_async(),
        app.send_task("plus", (5,), {"y": 6}),
    ]
    reliable.drain()
    assert [result.get() for result in results] == [10, [0, 2, 4], 6, 7, 11]
    assert linked.children[0].get() == 11


def test_a_chord_waits_for_a_member_that_is_retried(app: Celery, reliable: Reliable) -> None:
    """Its body runs when the retry was due, and not before."""
    plus, sums = declare(app, add), declare(app, total)

    @declare(app, bind=True)
    def flaky(self: ReliableTask, x: int) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=10)
        return x

    result = chord([plus.s(1, 1), flaky.s(7)])(sums.s())
    reliable.drain(until=19)
    assert result.state == "PENDING"
    reliable.drain(until=1)
    assert result.get() == 9


def test_a_broken_task_fails_and_the_test_goes_on(app: Celery, reliable: Reliable) -> None:
    """Its dead letter says why; a task nobody knows is one, too."""

    @declare(app, name="shop.broken")
    def broken(card: str) -> None:
        raise ValueError("no such card")

    result = broken.delay("1234")
    app.send_task("shop.unknown")
    reliable.drain()
    assert result.state == "FAILURE"
    with pytest.raises(ValueError, match="no such card"):
        result.get()
    first, second = reliable.dead_letters
    assert (first.error, first.args, first.failure.reason) == (
        "ValueError: no such card",
        ["1234"],
        Reason.PERMANENT_ERROR,
    )
    assert second.failure.reason is Reason.UNKNOWN_TASK


def test_a_task_that_leaves_its_process_is_poison_in_the_end(app: Celery, reliable: Reliable) -> None:
    """``sys.exit`` ends the pool's child, not the test."""

    @declare(app, max_crashes=2)
    def leaving() -> None:
        raise SystemExit(1)

    leaving.delay()
    reliable.drain()
    assert [letter.failure.reason for letter in reliable.dead_letters] == [Reason.POISON]


def test_what_is_raised_to_end_the_test_ends_it(app: Celery, reliable: Reliable) -> None:
    """``pytest.fail`` in a task, or in a fake that it calls, is no failure of the task's."""

    @declare(app)
    def calling() -> None:
        pytest.fail("the bank must not be called")

    calling.delay()
    with pytest.raises(pytest.fail.Exception, match="must not be called"):
        reliable.drain()


def test_revoking_needs_no_broker(app: Celery, reliable: Reliable) -> None:
    """The revocation is in the store, and stands."""
    task = declare(app, add)
    app.control.revoke("a-task")
    result = task.apply_async((1,), task_id="a-task")
    reliable.drain()
    assert result.state == "REVOKED"


def test_a_rejected_message_comes_back(app: Celery, reliable: Reliable) -> None:
    """A plain task gives it to the broker, a reliable one to the store, for a second."""
    seen: list[tuple[str, bool]] = []

    def reject_once(self: Task) -> None:
        seen.append((self.name, self.request.delivery_info["redelivered"]))
        if len([name for name, _ in seen if name == self.name]) == 1:
            raise Reject("not now", requeue=True)

    declare(app, reject_once, bind=True, name="plain", base=Task, acks_late=True).delay()
    declare(app, reject_once, bind=True, name="reliable").delay()
    reliable.drain()
    assert seen == [("plain", False), ("reliable", False), ("plain", True)]
    reliable.drain(until=1)
    assert seen[3:] == [("reliable", False)]


def test_a_queue_can_be_purged(app: Celery, reliable: Reliable) -> None:
    """And remote control finds nobody, at once."""
    declare(app, add).delay(1)
    assert app.control.purge() == 1
    assert reliable.queue == []
    assert app.control.ping(timeout=0.01) == []


def test_a_message_that_cannot_be_read_is_shown_without_arguments(app: Celery, reliable: Reliable) -> None:
    """And becomes a dead letter, as in a worker."""
    declare(app, add).apply_async((1,), serializer="pickle")
    assert [(message.args, message.kwargs) for message in reliable.queue] == [((), {})]
    reliable.drain()
    assert [letter.failure.reason for letter in reliable.dead_letters] == [Reason.REJECTED]


# -- duplicates --------------------------------------------------------------------------------------------------------


def test_a_message_can_come_again(app: Celery, reliable: Reliable) -> None:
    """Before it has run and after: a redelivery, or a publisher whose reply was lost."""
    ran: list[int] = []
    result = declare(app, noting(ran)).delay(7)
    reliable.send_again(result)
    assert len(reliable.queue) == 2
    reliable.drain()
    reliable.send_again(result.id)
    reliable.drain()
    assert ran == [7]
    assert [event.name for event in reliable.events] == ["completed", "replayed", "replayed"]


def test_a_duplicate_that_waits_is_drained_when_the_first_has_ended(app: Celery, reliable: Reliable) -> None:
    """Another message with the key of a task that is being retried waits, and is given the result."""

    @declare(app, bind=True, idempotency_key="charge:{order}")
    def charge(self: ReliableTask, order: str) -> str:
        if self.request.retries == 0:
            raise self.retry(countdown=60)
        return f"receipt {self.request.id}"

    first, second = charge.delay("A1"), charge.delay("A1")
    reliable.drain()
    assert [message.task_id for message in reliable.waiting] == [first.id, second.id]
    reliable.drain(until="idle")
    assert first.get() == second.get() == f"receipt {first.id}"


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_the_application_is_as_before_when_the_test_is_over(app: Celery) -> None:
    """Store, broker, results, clock, eager mode and tracers: nothing of the rehearsal stays, whatever ends it."""
    task = declare(app, add)
    app.conf.task_always_eager = True
    assert app.conf.task_serializer == "json"
    runtime, conf = app.taskguard, dict(app.conf.changes)  # type: ignore[attr-defined]
    kept = {name: vars(app).get(name) for name in ("_pool", "_backend_cache", "now", "_connection")}
    trace, pool = app.tasks[task.name].__trace__, app.amqp._producer_pool
    with suppress(ZeroDivisionError), Reliable(app) as reliable:
        assert app.taskguard is not runtime  # type: ignore[attr-defined]
        with Reliable(app) as inner:
            task.delay(2)
            assert (len(inner.queue), reliable.queue) == (1, [])
        result = task.delay(1)
        reliable.drain()
        assert result.get() == 1
        raise ZeroDivisionError
    assert app.taskguard is runtime  # type: ignore[attr-defined]
    assert app.conf.changes == conf
    assert {name: vars(app).get(name) for name in kept} == kept
    assert (app.tasks[task.name].__trace__, app.amqp._producer_pool) == (trace, pool)
    assert abs(wall_clock() - time.time()) < 1


def test_two_tests_do_not_see_each_other(app: Celery) -> None:
    """A key that one has used is free in the next."""
    ran: list[int] = []
    task = declare(app, noting(ran), idempotency_key="the-key")
    for n in (1, 2):
        with Reliable(app) as reliable:
            assert (reliable.queue, reliable.waiting, reliable.dead_letters, reliable.events) == ([], [], [], [])
            task.delay(n)
            reliable.drain()
    assert ran == [1, 2]


# -- bad use -----------------------------------------------------------------------------------------------------------


def test_bad_use_gets_one_clear_line(app: Celery, reliable: Reliable) -> None:
    """What is wrong, and the way out."""
    with pytest.raises(ConfigurationError, match="42 is no Celery application"):
        Reliable(42).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no message of task 'nope' was sent"):
        reliable.send_again("nope")
    with pytest.raises(ConfigurationError, match="advance: 'soon' is not a duration"):
        reliable.advance("soon")
    with pytest.raises(ConfigurationError, match="until: 'never' is neither a duration nor an ISO 8601 instant"):
        reliable.drain(until="never")
    with pytest.raises(ConfigurationError, match=r"follow: None cannot be moved; give what `freeze_time\(...\)`"):
        reliable.clock.follow(None)


def test_a_task_does_not_drain(app: Celery, reliable: Reliable) -> None:
    """It would wait for itself."""

    @declare(app)
    def draining() -> None:
        reliable.drain()

    draining.delay()
    reliable.drain()
    assert "drain in the test, not in the task" in reliable.dead_letters[0].error


@pytest.mark.parametrize("wait", [None, 60])
def test_a_task_that_goes_on_for_ever_is_found_out(
    app: Celery, reliable: Reliable, monkeypatch: pytest.MonkeyPatch, wait: int | None
) -> None:
    """It is named, and the test does not hang."""
    monkeypatch.setattr("taskguard.testing.reliable.BUSY", 20)
    monkeypatch.setattr("taskguard.testing.reliable.MOVES", 20)

    @declare(app, bind=True, name="shop.again")
    def again(self: ReliableTask) -> None:
        self.apply_async(countdown=wait)

    again.delay()
    with pytest.raises(AssertionError, match=r"drain: no end after 20 .*; shop\.again goes on and on"):
        reliable.drain(until="idle")
