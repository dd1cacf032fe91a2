"""Rows 14-17, 25 and 26: what waits, or runs, longer than the broker is ready to wait."""

from __future__ import annotations

from datetime import UTC, datetime

from celery.result import AsyncResult

from tests.proof.outcome import Outcome
from tests.proof.rows import POOLS, Setup, row
from tests.proof.stage import Stage

ON_REDIS = ("redis",)
POLLED = ("prefork", "threads")
"""The pools in whose event loop kombu looks for messages past their visibility timeout; with gevent it does not."""
IMPATIENT = Setup(transport={"visibility_timeout": 1, "unacked_restore_interval": 0.3, "unacked_restore_throttle": 1})
VISIBILITY_TIMEOUT = 1.0
CLOCKS = 0.1
"""Seconds by which the store's clock, which says what is due, may differ from that of the journal."""
LATE = Setup(options={"acks_late": True})
KEPT_AT_BROKER = Setup(env={"TASKGUARD_EARLY_ACK": "0"})
QUORUM = Setup(conf={"task_default_queue_type": "quorum", "task_default_exchange_type": "topic"})


def _repeats(stage: Stage, results: list[AsyncResult]) -> int:
    """How often the broker handed out again what was under way or done: recognised by taskguard, run by stock."""
    if stage.guarded:
        return sum(stage.total(what, results) for what in ("discarded", "replayed"))
    return stage.total("started", results) - len(results)


@row(
    14,
    "run longer than the visibility timeout",
    brokers=ON_REDIS,
    pools=POLLED,
    both=IMPATIENT | LATE,
    guarded=KEPT_AT_BROKER,
)
def long_run(stage: Stage) -> Outcome:
    """A task runs for several visibility timeouts, with slots free; acknowledged late, and not before its end."""
    stage.worker()
    results = [stage.send("nap", 4 * VISIBILITY_TIMEOUT)]
    stage.fired(lambda: _repeats(stage, results) > 0, "the broker handed out the message of a running task again")
    outcome = stage.finish(results)
    if stage.guarded:
        assert stage.told("discarded", results[0], "in_custody"), "the redelivery was recognised"
    return outcome


@row(15, "ETA longer than the visibility timeout", brokers=ON_REDIS, pools=POLLED, both=IMPATIENT, patience=8)
def eta(stage: Stage) -> Outcome:
    """Tasks with a countdown of several visibility timeouts, and two workers to hand them to."""
    stage.start_worker()
    stage.start_worker()
    sent_at = stage.clock()
    results = [stage.send("work", number, countdown=4 * VISIBILITY_TIMEOUT) for number in range(5)]
    stage.wait_all("started", results)
    first = min(entry.at for result in results for entry in stage.started(result))
    stage.fired(first - sent_at > 3 * VISIBILITY_TIMEOUT, "every task waited for several visibility timeouts")
    return stage.finish(results)


@row(16, "retry later than the visibility timeout", brokers=ON_REDIS, pools=POLLED, both=IMPATIENT | LATE, patience=12)
def retry(stage: Stage) -> Outcome:
    """Tasks that ask for a retry in several visibility timeouts."""
    stage.worker()
    results = [stage.send("retried", 4 * VISIBILITY_TIMEOUT) for _ in range(3)]
    stage.wait_all("started", results, each=2)
    waited = min(stage.started(result)[1].at - stage.started(result)[0].at for result in results)
    stage.fired(waited > 3 * VISIBILITY_TIMEOUT, "every retry waited for several visibility timeouts")
    return stage.finish(results, starts=6)


@row(
    17, "prefetched for longer than the visibility timeout", brokers=ON_REDIS, pools=POLLED, concurrency=1,
    both=IMPATIENT | LATE | Setup(conf={"worker_prefetch_multiplier": 4}), guarded=KEPT_AT_BROKER, patience=20,
)  # fmt: skip
def prefetched(stage: Stage) -> Outcome:
    """One slot and four messages fetched: the last waits in the worker for several visibility timeouts."""
    stage.worker()
    results = [stage.send("nap", 0.8 * VISIBILITY_TIMEOUT) for _ in range(8)]
    stage.fired(lambda: _repeats(stage, results) > 0, "the broker handed out a waiting message again")
    return stage.finish(results)


@row(25, "many ETA tasks and a killed worker", pools=POOLS, patience=30)
def many_etas(stage: Stage) -> Outcome:
    """A hundred tasks with a countdown; the worker that could hold them all is SIGKILLed before they are due."""
    worker = stage.worker()
    began = stage.clock()
    stage.send("work", countdown=0.1)
    # As many seconds as the sending may take here, and some to kill the worker in.
    due_at = stage.clock() + 5 + min(20, 200 * (stage.clock() - began))
    eta = datetime.fromtimestamp(due_at, UTC)
    results = [stage.send("work", number, eta=eta) for number in range(100)]
    if not stage.guarded:
        stage.wait(lambda: worker.says(results[-1].id), "the worker holds the last of them")
    stage.fired(stage.clock() < due_at and not stage.total("started", results), "none was due yet")
    worker.kill()
    stage.start_worker()
    outcome = stage.finish(results)
    if stage.guarded:
        wanted = {result.id for result in results}
        runs = [run for run in stage.journal.entries("started") if run.task_id in wanted]
        assert min(run.at for run in runs) >= due_at - CLOCKS, "none ran before its time"
    return outcome


@row(26, "quorum queue with native delays", brokers=("rabbitmq",), pools=POOLS, alone=True, both=QUORUM)
def quorum_delay(stage: Stage) -> Outcome:
    """Delays on a quorum queue in a fresh virtual host; one with the wildcard route of Celery's documentation."""
    stage.worker()
    sent_at = stage.clock()
    results = [stage.send("work", number, countdown=4) for number in range(3)]
    retries = [stage.send("retried", 4) for _ in range(2)]
    note = ""
    stage.app.conf.task_routes = {"*": {"routing_key": stage.queue}}
    stage.app.amqp.flush_routes()
    stage.app.amqp.__dict__.pop("router", None)
    try:
        results.append(stage.send("work", 99, countdown=4))
    except KeyError as exc:
        note = f"apply_async with a countdown and a wildcard route raised KeyError {exc}"
    queues = stage.app.amqp.queues
    stage.fired(queues[stage.queue].queue_arguments == {"x-queue-type": "quorum"}, "the queue is a quorum queue")
    outcome = stage.finish([*results, *retries], starts=len(results) + 2 * len(retries), note=note)
    late = [run.at - sent_at - 4 for result in results for run in stage.started(result)]
    late += [stage.started(result)[1].at - stage.started(result)[0].at - 4 for result in retries]
    if stage.guarded:
        assert min(late) >= -CLOCKS, "none was early"
        assert max(late) < 3.5, f"and none was delayed a second time: {late}"
    return outcome
