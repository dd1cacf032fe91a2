"""``downstream=`` of a task: asked before its body, deferred to its slot, charged only with what is its own fault."""

# ruff: noqa: F811
from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from taskguard import ConfigurationError, ReliableTask, Retry
from taskguard.downstream.service import Downstream
from taskguard.envelope import Envelope
from taskguard.errors import RateLimitedError
from taskguard.headers import bookings
from taskguard.policies import CircuitBreaker, Concurrency, LeakyBucket, TokenBucket
from taskguard.record import Reason, State
from taskguard.testing import Reliable
from tests.unit.downstreamhouse import Down, Line, circuit, joined, ran, taskguard_app  # noqa: F401
from tests.unit.rehearsal import declare

# -- declared ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("downstream", "complaint"),
    [
        ("bank", r"downstream='bank' is no Downstream; give Downstream\("),
        ([Downstream("bank"), 7], r"downstream=7 is no Downstream"),
        ([Downstream("bank"), Downstream("bank")], r"'bank' is named twice"),
        (Downstream("bank", circuit=CircuitBreaker(on_open="fallback")), r"on_open=\"fallback\" and it has none"),
    ],
)
def test_a_wrong_declaration_fails_at_its_line(taskguard_app: Celery, downstream: object, complaint: str) -> None:
    """And says what to write."""
    with pytest.raises(ConfigurationError, match=complaint):
        declare(taskguard_app, lambda: None, name="wrong", downstream=downstream)


def test_a_plain_task_has_no_downstream(taskguard_app: Celery) -> None:
    """Nobody would ask it."""
    with pytest.raises(ConfigurationError, match="add base=ReliableTask"):
        taskguard_app.task(downstream=Downstream("bank"))


def test_it_may_be_declared_on_a_class(taskguard_app: Celery) -> None:
    """For all the tasks that call the bank."""
    bank, mail = Downstream("bank"), Downstream("mail")

    class Banking(ReliableTask):
        abstract = True
        downstream = (bank, mail)

    assert Banking().downstreams == (bank, mail)


def resting(reliable: Reliable, task: str) -> list[Envelope]:
    """The messages of a task that rest."""
    found = reliable.store.scan(State.PENDING)
    return [Envelope.from_wire(record.wire or b"") for record in found if record.task == task]


# -- rates ------------------------------------------------------------------------------------------------------------


def test_refused_tasks_come_back_one_by_one_each_for_its_own_slot(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any]
) -> None:
    """In the order in which they were sent, and not a permit is wasted."""
    line = Line(taskguard_app, ran, rate=LeakyBucket(1))
    began = reliable.clock()
    results = line.send(0, 1, 2, 3)
    reliable.drain()
    assert ran == [0]
    assert [round((message.due_at or 0) - began, 3) for message in reliable.waiting] == [1.0, 2.0, 3.0]
    assert [result.state for result in results] == ["SUCCESS", "DEFERRED", "DEFERRED", "DEFERRED"]
    for number in (1, 2, 3):
        reliable.drain(until=began + number - reliable.clock() + 0.001)
        assert ran == list(range(number + 1))
    assert [event.name for event in reliable.events].count("deferred") == 3


def test_waiting_for_a_turn_is_no_attempt(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """A task that may not be retried at all is deferred as often as it takes, and may then fail by itself."""
    line = Line(taskguard_app, ran, rate=LeakyBucket(1))
    line.send(0)
    last = line.send(1)[0]
    reliable.drain()
    line.down = True
    reliable.drain(until="idle")
    assert ran == [0, 1]
    (letter,) = reliable.dead_letters
    assert letter.record.task_id == last.id
    assert letter.failure.error_type == "Down"
    assert [attempt.outcome for attempt in letter.record.attempts] == ["defer", "dead"]


def test_who_comes_new_stands_behind_those_who_wait(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """Also at the very moment when the first of them could go."""
    line = Line(taskguard_app, ran, rate=LeakyBucket(1))
    line.send(0, 1, 2)
    reliable.drain()
    reliable.advance(1.5)
    line.send(3)
    reliable.drain(until="idle")
    assert ran == [0, 1, 2, 3]


def test_a_slot_past_the_deadline_is_given_back_and_the_task_ends(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any]
) -> None:
    """Now, and not when the slot comes; who books next has it."""
    line = Line(taskguard_app, ran, rate=LeakyBucket(1))
    began = reliable.clock()
    line.send(0, 1)
    line.task.apply_async((2,), deadline=1.5)
    reliable.drain()
    (letter,) = reliable.dead_letters
    assert letter.failure.reason is Reason.EXPIRED
    assert "its slot of limit 'line' at 20" in letter.failure.message
    assert "0.5 s after it (line: limit 'line' (1 per 1 s) is used up" in letter.failure.message
    line.send(3)
    reliable.drain()
    assert [round((message.due_at or 0) - began, 3) for message in reliable.waiting] == [1.0, 2.0]


def test_a_task_that_costs_more_than_a_bucket_holds_is_a_dead_letter_at_once(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any]
) -> None:
    """It would wait for ever."""
    line = Line(taskguard_app, ran, rate=TokenBucket(2), cost=lambda n: n)
    line.send(1, 3)
    reliable.drain()
    (letter,) = reliable.dead_letters
    assert letter.failure.reason is Reason.REFUSED
    assert letter.failure.error_type == "RateLimitedError"
    assert ran == [1]


def test_a_booking_stays_with_its_delivery(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """The deferred message carries it; the retry of the run, and what the run sends, do not."""
    seen: list[Any] = []
    sent_on: list[Any] = []

    def note(self: ReliableTask) -> None:
        sent_on.append(self.request.headers["taskguard"])

    child = declare(taskguard_app, note, name="child", bind=True)
    bank = Downstream("bank", rate=LeakyBucket(1))

    def parent(self: ReliableTask, n: int) -> None:
        seen.append((n, "booked" in self.request.headers["taskguard"]))
        child.apply_async(headers=dict(self.request.headers))
        if self.request.retries == 0:
            raise self.retry(countdown=5)

    sent = declare(taskguard_app, parent, name="parent", bind=True, downstream=bank, max_retries=1)
    for n in range(2):
        sent.delay(n)
    reliable.drain()
    assert seen == [(0, False)]
    assert [set(bookings(each)) for each in resting(reliable, "parent") if each.retries == 0] == [{"bank"}]
    reliable.drain(until=1.001)
    assert seen[-1] == (1, True)
    assert [bookings(each) for each in resting(reliable, "parent")] == [{}, {}]
    assert len(sent_on) == 2
    assert not any("booked" in stamp for stamp in sent_on)
    reliable.drain(until="idle")
    assert [n for n, _ in seen] == [0, 1, 0, 1]


def test_a_refusal_inside_the_body_defers_it_too(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """Whatever the body did before is done again; Celery's autoretry does not take it for a failure."""
    bank = Downstream("bank", rate=LeakyBucket(1))

    def body(n: int) -> None:
        ran.append(("began", n))
        bank.call(ran.append, n)

    sent = declare(taskguard_app, body, name="body", autoretry_for=(Exception,), max_retries=0)
    for n in range(3):
        sent.delay(n)
    reliable.drain(until="idle")
    assert [entry for entry in ran if isinstance(entry, int)] == [0, 1, 2]
    assert not reliable.dead_letters


def test_in_eager_mode_a_refusal_is_raised(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """Nobody would bring the task back."""
    line = Line(taskguard_app, ran, rate=LeakyBucket(1))
    line.task.apply((0,))
    with pytest.raises(RateLimitedError) as caught:
        line.task.apply((1,), throw=True)
    assert caught.value.retry_after == pytest.approx(1.0, abs=0.01)


def test_several_downstreams_must_all_agree(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """A task keeps its place with the one while the other refuses."""
    slow, fast = Downstream("slow", rate=LeakyBucket(1)), Downstream("fast", rate=LeakyBucket(2))

    def both(n: int) -> None:
        ran.append(n)

    sent = declare(taskguard_app, both, name="both", downstream=[fast, slow])
    began = reliable.clock()
    for n in range(4):
        sent.delay(n)
    reliable.drain(until="idle")
    assert sorted(ran) == [0, 1, 2, 3]
    assert reliable.clock() - began >= 3.0


# -- slots ------------------------------------------------------------------------------------------------------------


def test_a_slot_is_held_until_the_run_ended_and_no_longer(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any]
) -> None:
    """Whether it returns or raises."""
    line = Line(taskguard_app, ran, concurrency=Concurrency(1))

    def look(n: int) -> None:
        with pytest.raises(Exception, match="line") as caught, line.downstream.using().permit():
            pytest.fail("the place was taken twice")
        ran.append(type(caught.value).__name__)
        if n:
            raise Down(n)

    sent = declare(taskguard_app, look, name="look", downstream=line.downstream, retry=Retry(max_retries=0))
    del sent
    line.down = True
    line.send(1, 2, 3)
    reliable.drain(until="idle")
    assert ran == [1, 2, 3]
    assert len(reliable.dead_letters) == 3
    assert not [event for event in reliable.events if event.name == "deferred"]
