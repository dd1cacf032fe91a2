"""Rows 32-37: a message is sent and the broker is away, or the result is told and the backend is, or both go round."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from celery import Celery
from kombu.exceptions import OperationalError

from tests.integration.proxy import Fault, Proxy
from tests.proof import tasks
from tests.proof.outcome import Outcome
from tests.proof.rows import POOLS, Setup, belongs, row
from tests.proof.stage import Stage

CONFIRMED = Setup(transport={"confirm_publish": True})
"""Without it RabbitMQ sends no reply that could be lost; `taskguard.install` sets it."""
REFUSED_WITHIN = 10.0
"""Seconds in which a producer is told that its broker is dead; Celery's three tries take less than one."""
OUTAGE = 3.0
PAUSE = 1.0
"""Seconds between two runs of a task that is rejected and requeued."""


@contextmanager
def _producer(stage: Stage, broker: str) -> Iterator[Celery]:
    """Another producer of the stage's application, with a broker URL of its own."""
    environ = {**stage.environ(), "TEST_BROKER": broker}
    app = tasks.make_app(environ, store=stage.store_url, namespace=stage.namespace)
    try:
        yield app
    finally:
        app.pool.force_close_all()
        app.journal.close()
        if stage.guarded:
            app.taskguard.store.close()
        app.close()


@row(32, "dead broker at apply_async")
def dead_broker(stage: Stage) -> Outcome:
    """A producer's broker dies between two calls, and stays dead; what is delayed does not need it yet."""
    stage.worker()
    ids = [str(uuid.uuid4()) for _ in range(3)]
    with Proxy(stage.broker) as proxy, _producer(stage, proxy.url) as app:
        results = [app.tasks["work"].apply_async((0,))]
        with proxy.away():
            asked = stage.clock()
            refused = [_is_refused(app, (number,), task_id=id) for number, id in enumerate(ids)]
            took = (stage.clock() - asked) / len(ids)
            later = str(uuid.uuid4())
            rested = not _is_refused(app, (9,), task_id=later, countdown=1)
        stage.fired(all(refused), "each call raised OperationalError")
    if stage.guarded:
        assert took < REFUSED_WITHIN
        assert rested, "a delayed message is accepted by the store"
        assert not any(stage.started(stage.app.AsyncResult(id)) for id in ids)
    results += [stage.app.AsyncResult(later)] if rested else []
    # What was refused is sent again under its id, as its producer may.
    results += [stage.send("work", number, task_id=id) for number, id in enumerate(ids)]
    return stage.finish(results, note=f"refused in {took:.1f} s; a delayed one {'kept' if rested else 'refused'}")


def _is_refused(app: Celery, args: tuple[object, ...], **options: object) -> bool:
    try:
        app.tasks["work"].apply_async(args, **options)
    except OperationalError:
        return True
    return False


belongs(
    33,
    "black-holed connection",
    "Belongs to the outbox: a producer that hands its message to its own database needs no answer from the broker. "
    "Today a producer on such a connection waits as long as Celery does.",
)


@row(34, "reply lost after publish", smoke=True, pools=POOLS, both=CONFIRMED)
def reply_lost(stage: Stage) -> Outcome:
    """The broker has the message and the connection breaks before it says so: the client publishes once more."""
    stage.kill_all()
    results = []
    with Proxy(stage.broker) as proxy, _producer(stage, proxy.url) as app:
        work = app.tasks["work"]
        results.append(work.apply_async((0,)))
        for _ in range(3):  # each reply on the way of a publish is lost once, the last one too
            for number in itertools.count(1):
                proxy.arm(Fault("reply", number))
                results.append(work.apply_async((number,)))
                if not proxy.fired:
                    break
        repeated = str(uuid.uuid4())
        for last in range(number - 1, 0, -1):
            proxy.arm(Fault("reply", last))
            if _is_refused(app, (99,), task_id=repeated, retry=False):
                break
        proxy.heal()
        results.append(work.apply_async((99,), task_id=repeated))  # told that it failed, its producer sends it again
    copies = stage.queued() - len(results)
    stage.fired(copies >= 3, "the broker has more messages than were sent")
    stage.start_worker()
    outcome = stage.finish(results, note=f"{copies} messages more than were sent")
    if stage.guarded:
        known = sum(stage.total(what, results) for what in ("replayed", "discarded"))
        stage.wait(
            lambda: sum(stage.total(what, results) for what in ("replayed", "discarded")) == copies,
            f"{copies} copies to be recognised, {known} so far",
        )
    return outcome


@row(35, "publish of a retry refused", pools=POOLS)
def retry_refused(stage: Stage) -> Outcome:
    """The broker refuses connections when running tasks ask for a retry, and takes them again later."""
    stage.kill_all()
    with Proxy(stage.broker) as proxy:
        conf = dict(stage.row.setup(stage.contestant).conf, broker_write_url=proxy.url)
        worker = stage.start_worker(TEST_CONF=json.dumps(conf))
        with proxy.away():
            turned_away = proxy.connections
            results = [stage.send("retried", 0.1) for _ in range(5)]
            stage.wait_all("started", results)
            stage.fired(lambda: proxy.connections > turned_away, "somebody was refused while publishing a retry")
            if stage.guarded:
                stage.wait(
                    lambda: all(stage.told("retried", result) for result in results), "every retry is in the store"
                )
            else:
                stage.wait(lambda: all(worker.says(f"{r.id}] ") for r in results), "the runs' ends")
        outcome = stage.finish(results, starts=10)
        if stage.guarded:
            assert outcome.starts == 10, "one first run and one retry each"
            assert worker.alive
        stage.kill_all()  # whose broker goes with the proxy
    return outcome


@row(36, "result backend down at the task's end", pools=POOLS, private=("backend",))
def backend_down(stage: Stage) -> Outcome:
    """The result backend is killed while tasks run, and comes back some seconds after they have ended."""
    stage.worker()
    gate = stage.gate()
    results = [stage.send("held", gate) for _ in range(2)]
    stage.wait_all("started", results)
    backend = stage.servers["backend"]
    backend.kill()
    stage.journal.open(gate)
    stage.wait_all("finished", results)
    stage.fired(True, "the bodies ended without a backend to tell")
    back_at = stage.clock() + OUTAGE
    stage.wait(lambda: stage.clock() > back_at, "the end of the outage")
    backend.start()
    return stage.finish(results)


@row(37, "Reject with requeue", pools=POOLS, patience=8)
def requeued(stage: Stage) -> Outcome:
    """Tasks that are not to run for three seconds, and say so by Reject(requeue=True), with early and with late ack."""
    stage.worker()
    until = stage.clock() + 3
    early = [stage.send("turned_away", until) for _ in range(2)]
    late = [stage.send("turned_away_late", until) for _ in range(2)]
    results = [*early, *late]
    stage.fired(lambda: all(stage.started(result) for result in results), "each was rejected")
    outcome = stage.finish(results, starts=5 * len(results))
    if stage.guarded:
        for result in results:
            at = [run.at for run in stage.started(result)]
            assert len(at) > 1, "it came back"
            assert min(after - before for before, after in itertools.pairwise(at)) >= 0.9 * PAUSE
            assert not stage.told("retried", result), "and spent no attempt"
    return outcome
