"""Rows 1-4, 8-10, 12, 13: a pool child dies."""

from __future__ import annotations

from celery.result import AsyncResult

from taskguard.record import Reason
from tests.proof.outcome import Outcome
from tests.proof.rows import Setup, row
from tests.proof.stage import Stage

LATE = Setup(options={"acks_late": True})
LATE_REJECT = Setup(options={"acks_late": True, "reject_on_worker_lost": True})
RETRY_LOST = Setup(conf={"task_retry_on_worker_lost": True})
SOON = Setup(options={"default_retry_delay": 1})
"""Stock's retries come after three minutes, which nobody wants to wait for here."""
LIMITED_QUEUE = Setup(queue={"x-queue-type": "quorum", "x-delivery-limit": 5})
MAX_CRASHES = 3


def _children_die(stage: Stage) -> Outcome:
    """Ten tasks whose first run SIGKILLs its process."""
    worker = stage.worker()
    results = [stage.send("frail") for _ in range(10)]
    stage.fired(lambda: len(stage.counts("killing", results)) == len(results), "each task's child was killed")
    outcome = stage.finish(results, starts=20)
    if stage.guarded:
        assert outcome.starts == 20, "every first run died, and every second one ended"
        assert worker.alive
    return outcome


@row(1, "child killed, early ack", smoke=True, stock=Setup(options={"acks_late": False}))
def early(stage: Stage) -> Outcome:
    """A pool child is SIGKILLed in mid-run; the message was acknowledged when it arrived."""
    return _children_die(stage)


@row(2, "child killed, acks_late", both=LATE)
def late(stage: Stage) -> Outcome:
    """A pool child is SIGKILLed in mid-run; the message is acknowledged afterwards, all the same."""
    return _children_die(stage)


@row(3, "child killed, reject_on_worker_lost", both=LATE_REJECT)
def rejected(stage: Stage) -> Outcome:
    """A pool child is SIGKILLed in mid-run; the message is given back to the broker."""
    return _children_die(stage)


@row(4, "child killed, task_retry_on_worker_lost", both=RETRY_LOST, stock=SOON)
def retried(stage: Stage) -> Outcome:
    """A pool child is SIGKILLed in mid-run; Celery 5.7 retries, up to the task's max_retries."""
    return _children_die(stage)


def _poison(stage: Stage) -> Outcome:
    """A task that always kills its child, and good tasks beside it."""
    worker = stage.worker()
    poison = stage.send("poison")
    good = [stage.send("work", number) for number in range(4)]
    stage.fired(lambda: bool(stage.counts("killing", [poison])), "the task killed its process")
    outcome = stage.finish([poison, *good], completed=len(good), starts=len(good) + MAX_CRASHES)
    if stage.guarded:
        assert_poison(stage, poison)
        assert len(stage.started(poison)) == MAX_CRASHES
        assert worker.alive
    return outcome


def assert_poison(stage: Stage, result: AsyncResult) -> None:
    """The task is a dead letter of this reason, with every crash in its history."""
    letter = stage.letter(result.id)
    assert letter.failure.reason is Reason.POISON
    assert [attempt.outcome for attempt in letter.record.attempts] == ["crash"] * MAX_CRASHES + ["dead"]
    assert [run.crashes for run in stage.started(result)] == list(range(MAX_CRASHES))
    assert len({run.pid for run in stage.started(result)}) == MAX_CRASHES, "every run took a process down"


@row(8, "poison child-killer, reject_on_worker_lost", smoke=True, both=LATE_REJECT)
def poison_rejected(stage: Stage) -> Outcome:
    """A task SIGKILLs its process every time, and is given back to the broker every time."""
    return _poison(stage)


@row(9, "poison on a quorum queue with a delivery limit", brokers=("rabbitmq",), both=LATE_REJECT | LIMITED_QUEUE)
def poison_quorum(stage: Stage) -> Outcome:
    """The same on a quorum queue, which drops the message after its delivery limit of five."""
    return _poison(stage)


@row(10, "poison with task_retry_on_worker_lost", both=RETRY_LOST, stock=SOON)
def poison_retried(stage: Stage) -> Outcome:
    """The same with Celery 5.7's retries."""
    return _poison(stage)


@row(12, "crash after the result is stored", both=LATE_REJECT)
def after_result(stage: Stage) -> Outcome:
    """A child dies when its result is stored and its message not yet acknowledged; half the tasks ignore results."""
    stage.worker()
    results = [stage.send("crash_after", ignore_result=bool(number % 2)) for number in range(10)]
    stage.fired(lambda: len(stage.counts("killing", results)) == len(results), "each child died after its run")
    return stage.finish(results)


@row(13, "crash after a retry is published", both=LATE_REJECT)
def after_retry(stage: Stage) -> Outcome:
    """A child dies when its retry is published and its message not yet acknowledged."""
    stage.worker()
    results = [stage.send("retry_then_crash", 0.3) for _ in range(5)]
    stage.fired(lambda: len(stage.counts("killing", results)) == len(results), "each child died after asking")
    outcome = stage.finish(results, starts=10)
    if stage.guarded:
        assert outcome.starts == 10, "one first run and one retry each"
    return outcome
