"""Where custody and permits are asked for in one step: what is asked, what is not, and what is given back."""

# ruff: noqa: F811
from __future__ import annotations

import threading
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from taskguard import Retry
from taskguard.celery.entrance import Entrance
from taskguard.celery.runtime import Runtime
from taskguard.downstream.service import Downstream
from taskguard.envelope import Envelope
from taskguard.errors import StoreUnavailable
from taskguard.gate import Custody, Gate
from taskguard.permits import Ask, Permit, RateAsk, Slot, SlotAsk
from taskguard.policies import Concurrency, LeakyBucket, TokenBucket
from taskguard.record import Reason
from taskguard.testing import Reliable
from tests.unit.downstreamhouse import Line, StepByStep, ran, taskguard_app  # noqa: F401
from tests.unit.rehearsal import declare, noting

ONE = LeakyBucket(1)


class Counting(StepByStep):
    """A joint store that keeps what it was asked, and fails as often as it is told to."""

    asked: list[Ask]
    fails: int

    def claim(self, envelope: Envelope, **told: Any) -> Any:
        """As the contract says."""
        Counting.asked.append(told["ask"])
        if Counting.fails:
            Counting.fails -= 1
            raise StoreUnavailable("the test says so")
        return super().claim(envelope, **told)


@pytest.fixture(autouse=True)
def joint(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    """What was asked in one step with a claim."""
    Counting.asked, Counting.fails = [], 0
    monkeypatch.setattr(Runtime, "joined_with", lambda runtime, permits: Counting(runtime.store, permits))
    return Counting


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The gate's own steps for runs, by name."""
    taken: list[str] = []
    for name in ("defer", "expire"):
        was = getattr(Gate, name)

        def step(self: Gate, custody: Custody, *args: Any, _was: Any = was, _name: str = name, **options: Any) -> Any:
            taken.append(_name)
            return _was(self, custody, *args, **options)

        monkeypatch.setattr(Gate, name, step)
    return taken


def test_a_run_asks_once_and_a_refused_one_rests_by_that(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], joint: type[Counting], steps: list[str]
) -> None:
    """Two messages, one slot: three claims with their questions, and no step more to defer the second."""
    line = Line(taskguard_app, ran, rate=ONE)
    line.send(0, 1)
    reliable.drain(until="idle")
    assert ran == [0, 1]
    assert [(ask.book, ask.booked) for ask in joint.asked] == [(True, False), (True, False), (True, True)]
    assert steps == []
    assert [event.name for event in reliable.events].count("deferred") == 1


def test_a_duplicate_takes_no_permit(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """It is told the result, and the next message has the permit."""
    line = Line(taskguard_app, ran, rate=TokenBucket(2, per=100))
    sent = line.send(0)[0]
    reliable.drain()
    reliable.send_again(sent)
    line.send(1)
    reliable.drain()
    assert ran == [0, 1]


def test_what_comes_too_late_gives_its_place_back(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], joint: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline passed while the store was asked: a dead letter, and nobody holds the place."""
    line = Line(taskguard_app, ran, concurrency=Concurrency(1))
    line.task.apply_async((0,), deadline=5)
    was = StepByStep.claim

    def slow(self: StepByStep, *args: Any, **told: Any) -> Any:
        found = was(self, *args, **told)
        reliable.advance(6)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(StepByStep, "claim", slow)
        reliable.drain()
    assert ran == []
    assert [letter.failure.reason for letter in reliable.dead_letters] == [Reason.EXPIRED]
    assert isinstance(line.downstream.permits.admit(Ask(slot=SlotAsk("line", 1, "next", 5))), Permit)
    line.downstream.permits.release([Slot("line", "next")])


def test_a_store_that_is_away_is_asked_again_with_the_same_question(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], joint: type[Counting]
) -> None:
    """With a claim's patience, and not by what a downstream declares for permits that cannot be had."""
    line = Line(taskguard_app, ran, rate=ONE, on_store_down="refuse")
    joint.fails = 2
    line.send(0)
    reliable.drain(until="idle")
    assert ran == [0]
    assert len(joint.asked) == 3
    assert len(set(map(repr, joint.asked))) == 1


def test_a_cost_that_fails_is_the_runs_own_failure(
    reliable: Reliable, taskguard_app: Celery, joint: type[Counting]
) -> None:
    """Code of the user's is not called before there is custody: the run is retried like any other."""
    costs: list[Any] = [ConnectionError(), 1.0]

    def cost(n: int) -> float:
        found = costs.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    done: list[int] = []
    bank = Downstream("bank", rate=ONE, cost=cost)
    retry = Retry(max_retries=1, first_delay=1)
    sent = declare(taskguard_app, noting(done), name="call", downstream=bank, retry=retry)
    sent.delay(7)
    reliable.drain()
    assert joint.asked == []
    assert done == []
    assert len(reliable.waiting) == 1
    reliable.drain(until="idle")
    assert done == [7]


def test_a_booking_is_used_up_by_the_first_question(
    reliable: Reliable, taskguard_app: Celery, joint: type[Counting]
) -> None:
    """A further call to the same downstream, in the body, stands behind all who wait."""
    bank = Downstream("bank", rate=LeakyBucket(1))
    asked: list[bool] = []
    was = bank.desk.store.admit

    def body(n: int) -> None:
        if n == 1:
            with bank.permit(covers=False):
                pass
            bank.call(int)

    def admit(ask: Ask) -> Any:
        asked.append(ask.booked)
        return was(ask)

    sent = declare(taskguard_app, body, name="body", downstream=bank)
    sent.delay(0)
    sent.delay(1)
    reliable.drain()
    bank.desk.store.admit = admit  # type: ignore[method-assign]
    reliable.drain(until=1.001)
    assert joint.asked[-1].booked
    assert asked[:1] == [False]


def test_a_downstream_of_another_store_is_asked_by_itself(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], joint: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the claim."""
    monkeypatch.setattr(Runtime, "joined_with", lambda runtime, permits: None)
    line = Line(taskguard_app, ran, rate=ONE)
    line.send(0, 1)
    reliable.drain(until="idle")
    assert ran == [0, 1]
    assert joint.asked == []


def test_while_the_permits_are_away_the_claim_goes_alone(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], joint: type[Counting]
) -> None:
    """The downstream says what becomes of calls then."""
    line = Line(taskguard_app, ran, rate=ONE)
    line.downstream.desk.store.outage.failed(StoreUnavailable("away"))
    line.send(0)
    reliable.drain()
    assert ran == [0]
    assert joint.asked == []


def test_what_the_process_knows_to_be_refused_is_not_asked(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], joint: type[Counting]
) -> None:
    """A cost over what the limit ever admits."""
    line = Line(taskguard_app, ran, rate=TokenBucket(2), cost=3.0)
    line.send(0)
    reliable.drain()
    assert joint.asked == []
    assert [letter.failure.reason for letter in reliable.dead_letters] == [Reason.REFUSED]
    assert isinstance(line.downstream.permits.admit(Ask(rates=(RateAsk("line", TokenBucket(2), 2),))), Permit)


def test_what_this_process_holds_is_not_taken_before_there_is_custody(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any]
) -> None:
    """Duplicates, and claims that the store did not answer, had kept local places for ever."""
    line = Line(taskguard_app, ran, concurrency=Concurrency(2, local=True), rate=TokenBucket(100))
    sent = line.send(0)[0]
    reliable.drain()
    for _ in range(3):
        reliable.send_again(sent)
        reliable.drain()
    line.send(1)
    reliable.drain()
    assert ran == [0, 1]
    assert line.downstream.guard.slots is not None
    assert line.downstream.guard.slots.active == 0


def test_a_duplicate_spends_nothing_of_a_lease(reliable: Reliable, taskguard_app: Celery, ran: list[Any]) -> None:
    """Leased permits are this process's, too."""
    line = Line(taskguard_app, ran, rate=TokenBucket(1, per=100, burst=3), leased=True)
    sent = line.send(0)[0]
    reliable.drain()
    reliable.send_again(sent)
    reliable.drain()
    line.send(1)
    reliable.drain()
    assert ran == [0, 1]


def test_a_booking_outlasts_the_wait_for_a_local_place(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question comes after it, and says that the run has waited its turn."""
    line = Line(taskguard_app, ran, rate=ONE, concurrency=Concurrency(1, local=True, max_wait=30))
    line.send(0, 1)
    reliable.drain()
    assert ran == [0]
    store, asked = line.downstream.desk.store, []
    was = store.admit

    def admit(ask: Ask) -> Any:
        asked.append(ask.booked)
        return was(ask)

    monkeypatch.setattr(store, "admit", admit)
    slots = line.downstream.guard.slots
    assert slots is not None
    assert slots.take()
    threading.Timer(0.1, slots.release).start()
    reliable.drain(until=1.001)
    assert asked == [True]
    assert ran == [0, 1]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("lost", [StoreUnavailable, SoftTimeLimitExceeded])
@pytest.mark.parametrize(
    "declared",
    [{"rate": ONE}, {"concurrency": Concurrency(1)}, {"rate": ONE, "concurrency": Concurrency(1)}],
    ids=["rate", "place", "both"],
)
def test_a_lost_answer_loses_nothing_and_repeats_nothing(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], monkeypatch: pytest.MonkeyPatch,
    declared: dict[str, Any], lost: type[Exception], at: int,
) -> None:  # fmt: skip
    """The step was made, and its answer did not come: each message runs once, and no place stays taken."""
    claims: list[int] = []

    class Lossy(StepByStep):
        def claim(self, *args: Any, **told: Any) -> Any:
            found = super().claim(*args, **told)
            claims.append(1)
            if len(claims) == at:
                raise lost("the answer was lost")
            return found

    monkeypatch.setattr(Runtime, "joined_with", lambda runtime, permits: Lossy(runtime.store, permits))
    line = Line(taskguard_app, ran, **declared)
    began = reliable.clock()
    line.send(0, 1, 2)
    reliable.drain(until="idle")
    assert sorted(ran) == [0, 1, 2]
    assert reliable.clock() - began < 20, "a place stayed taken until its lease ended"


def test_a_limit_that_strikes_behind_the_answer_runs_nothing_twice(
    reliable: Reliable, taskguard_app: Celery, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message rests already: what was answered once is not asked again."""
    line = Line(taskguard_app, ran, rate=ONE)
    asked: list[int] = []
    was = Entrance._ask

    def ask(self: Entrance, question: Ask) -> Any:
        found = was(self, question)
        asked.append(1)
        if len(asked) == 2:
            reliable.advance(1.5)
            raise SoftTimeLimitExceeded
        return found

    monkeypatch.setattr(Entrance, "_ask", ask)
    line.send(0, 1)
    reliable.drain(until="idle")
    assert ran == [0, 1]
