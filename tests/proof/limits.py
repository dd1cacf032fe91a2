"""Rows 18-24: time limits, `expires`, and RabbitMQ's own limit for its consumers."""

from __future__ import annotations

import json

from celery.result import AsyncResult

from taskguard.record import Reason
from tests.proof.outcome import Outcome
from tests.proof.rows import FETCHING, POOLS, Setup, row
from tests.proof.stage import Stage

LATE = Setup(options={"acks_late": True})
NO_ACK = Setup(conf={"task_acks_on_failure_or_timeout": False})
ENFORCED = ("prefork", "gevent")
"""The pools that enforce a hard limit."""


def _hard_limit(stage: Stage) -> Outcome:
    """Tasks that are stuck once, and one that is stuck for ever, under a hard limit and with one retry."""
    stage.worker()
    once = [stage.send("stuck", 1, time_limit=3) for _ in range(2)]
    always = stage.send("stuck", 99, time_limit=3)
    results = [*once, always]
    stage.wait_all("started", results)
    worker = stage.workers[-1]
    stage.fired(
        lambda: (
            all(worker.says(f"Hard time limit (3s) exceeded for stuck[{result.id}]") for result in results)
            or all(worker.says(result.id) and worker.says("TimeLimitExceeded(3") for result in results)
        ),
        "the pool's hard limit struck",
    )
    outcome = stage.finish(results, completed=len(once), starts=6)
    if stage.guarded:
        letter = stage.letter(always.id)
        assert letter.failure.reason is Reason.MAX_RETRIES
        assert letter.failure.error_type == "TimeLimitExceeded"
        assert [attempt.outcome for attempt in letter.record.attempts] == ["retry", "dead"]
        assert len(stage.started(always)) == 2
    return outcome


@row(18, "hard time limit, acks_late", pools=ENFORCED, both=LATE)
def hard(stage: Stage) -> Outcome:
    """A run over its hard limit is killed, acknowledged and not run again."""
    return _hard_limit(stage)


@row(19, "hard time limit, acks_on_failure_or_timeout off", pools=ENFORCED, both=LATE | NO_ACK, patience=16)
def hard_requeued(stage: Stage) -> Outcome:
    """A run over its hard limit is killed and requeued, for ever."""
    return _hard_limit(stage)


@row(20, "failure, acks_on_failure_or_timeout off", pools=POOLS, both=LATE | NO_ACK)
def failure_rejected(stage: Stage) -> Outcome:
    """An exception, or in prefork a soft limit, rejects the message without requeueing: the broker drops it."""
    stage.worker()
    broken = [stage.send("broken") for _ in range(2)]
    limited = [stage.send("patient", 30, soft_time_limit=1)] if stage.place.pool == "prefork" else []
    results = [*broken, *limited]
    stage.wait_all("started", results)
    for result in results:
        stage.fired(lambda id=result.id: stage.app.AsyncResult(id).ready(), "the task failed")
    outcome = stage.finish(results, completed=0)
    if stage.guarded:
        for result in results:
            letter = stage.letter(result.id)
            assert letter.failure.reason in (Reason.PERMANENT_ERROR, Reason.MAX_RETRIES)
            assert letter.envelope is not None
            assert json.loads(letter.envelope.body)[0] == ([30] if result in limited else [])
    return outcome


@row(21, "limits by pool", pools=POOLS)
def by_pool(stage: Stage) -> Outcome:
    """A run over its hard limit, and one over its soft limit: threads enforce neither, gevent the hard one."""
    stage.worker()
    hard = stage.send("patient", 3, time_limit=1)
    soft = stage.send("patient", 3, soft_time_limit=1)
    pool = stage.place.pool
    enforced = {"prefork": [hard, soft], "threads": [], "gevent": [hard]}[pool]
    ignored = [result for result in (hard, soft) if result not in enforced]
    stage.wait_all("started", [hard, soft])
    if ignored:
        stage.wait_all("finished", ignored)
    outcome = stage.finish([hard, soft], completed=len(ignored), note=f"{len(enforced)} of 2 limits enforced")
    stage.fired(not stage.counts("finished", enforced), "what the pool enforces was ended, and nothing else was")
    return outcome


@row(22, "expires, before a worker looks", smoke=True, pools=POOLS)
def expired(stage: Stage) -> Outcome:
    """Tasks expire in the queue while no worker is there; on RabbitMQ the broker itself drops them then."""
    stage.kill_all()
    results = [stage.send("work", number, expires=1) for number in range(5)]
    results.append(stage.send("work", 5, expires=1, ignore_result=True))
    gone_at = stage.clock() + 1.2
    stage.fired(lambda: stage.clock() > gone_at, "all have expired before a worker is there")
    stage.worker()
    return _none_ran(stage, results)


@row(
    23,
    "expires, after a worker has fetched it",
    pools=FETCHING,
    concurrency=1,
    both=Setup(conf={"worker_prefetch_multiplier": 8}),
)
def expired_at_worker(stage: Stage) -> Outcome:
    """Tasks expire in the worker, behind the run that occupies its only slot."""
    worker = stage.worker()
    busy = stage.send("held", gate := stage.gate())
    stage.wait_started(busy)
    results = [stage.send("work", number, expires=3) for number in range(6)]
    gone_at = stage.clock() + 3.2
    stage.wait(lambda: all(worker.says(f"work[{result.id}] received") for result in results), "all in the worker")
    stage.fired(stage.clock() < gone_at - 0.2, "the worker has fetched them before they expire")
    stage.wait(lambda: stage.clock() > gone_at, "their end")
    stage.journal.open(gate)
    stage.wait_state(busy, "SUCCESS")
    return _none_ran(stage, results)


def _none_ran(stage: Stage, results: list[AsyncResult]) -> Outcome:
    outcome = stage.finish(results, completed=0)
    if stage.guarded:
        assert outcome.starts == 0
        assert {stage.letter(result.id).failure.reason for result in results} == {Reason.EXPIRED}
    return outcome


@row(
    24, "consumer_timeout", brokers=("rabbitmq",), pools=POOLS, both=LATE, private=("broker",), patience=25,
    rabbitmq_settings={"consumer_timeout": 3000, "channel_tick_interval": 500},
)  # fmt: skip
def consumer_timeout(stage: Stage) -> Outcome:
    """RabbitMQ closes the channel of a worker that has not acknowledged for too long: a long run, and an ETA."""
    worker = stage.worker()
    began = stage.clock()
    results = [stage.send("nap", 8), stage.send("work", 1, countdown=8)]
    deaths = stage.supervise(lambda: len(stage.shown(results)) == len(results), timeout=stage.row.patience)
    stage.fired(lambda: stage.clock() - began > 6, "the run and the delay were longer than twice the timeout")
    outcome = stage.finish(results, note=f"{deaths} worker exits" if deaths else "")
    if stage.guarded:
        assert not deaths
        assert not worker.says("PRECONDITION_FAILED")
    return outcome
