"""The application of the crash points: ``celery -A tests.integration.crashapp worker``.

`serve` makes producers and operators that may die.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject

import taskguard.relay
from taskguard import CircuitBreaker, Concurrency, Downstream, Limit, ReliableTask, TokenBucket
from taskguard.celery import publishing
from taskguard.cli import cli
from tests.integration import crashpoints, tasks
from tests.integration.journal import Journal

PRODUCER_GRACE = 1.0
SWEEP_EVERY = 0.5
SLOT_LEASE = 1.0

BANK = Downstream("bank", rate=TokenBucket(100), concurrency=Concurrency(1, lease=SLOT_LEASE), circuit=CircuitBreaker())
"""Has one place: who does not give it back is in everybody's way until its lease ends."""
SHOP = Downstream(
    "shop",
    rate=TokenBucket(100),
    concurrency=Concurrency(1, lease=SLOT_LEASE),
    circuit=CircuitBreaker(
        failure_rate_threshold=0.001, minimum_calls=1, window_size=600, wait_in_open=0.3, backoff=1.0, probe_lease=1.0,
        slow_start=0.1,
    ),
)  # fmt: skip
"""Its circuit opens with one failure."""
RATION = Downstream("ration", rate=Limit(TokenBucket(1, per=3600), key="{n}"))
"""Has one permit for each name, and the next in an hour."""


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application of `tests.integration.tasks`, with these tasks added, its crash points ready to be armed."""
    app = tasks.make_app(environ, **settings)
    _declare(app, app.journal)
    if crashpoints.ENABLED in environ:
        publishing.PRODUCER_GRACE = PRODUCER_GRACE
        taskguard.relay.SWEEP_EVERY = SWEEP_EVERY
        crashpoints.install(app, environ, app.journal)
    return app


def _declare(app: Celery, journal: Journal) -> None:
    def task(name: str, **options: Any) -> Any:
        return app.task(bind=True, name=name, base=ReliableTask, shared=False, **options)

    started, finished = journal.started, journal.finished

    def runs(task: ReliableTask) -> int:
        return len(journal.entries("started", task.request.id))

    @task("failing")
    def failing(self: ReliableTask) -> None:
        started(self)
        raise ValueError("no such card")

    @task("ignoring")
    def ignoring(self: ReliableTask) -> None:
        started(self)
        raise Ignore

    @task("deferring")
    def deferring(self: ReliableTask) -> str:
        started(self)
        if runs(self) == 1:
            raise Reject("later", requeue=True)
        finished(self)
        return "second time"

    @task("asking")
    def asking(self: ReliableTask) -> bool:
        started(self)
        lost = self.custody_lost
        finished(self)
        return lost

    @task("named", unique_for=60, idempotency_key="named:{n}")
    def named(self: ReliableTask, n: str) -> str:
        started(self)
        finished(self)
        return n

    @task("stumbling")
    def stumbling(self: ReliableTask) -> int:
        started(self)
        if not self.custody.crashes:
            os.kill(os.getpid(), signal.SIGKILL)
        finished(self)
        return self.custody.crashes

    @task("fleeting", on_expired="discard")
    def fleeting(self: ReliableTask) -> None:
        started(self)

    @task("charging", downstream=BANK)
    def charging(self: ReliableTask, gate: str) -> None:
        started(self)
        journal.wait_at(gate)
        finished(self)

    @task("buying", downstream=SHOP)
    def buying(self: ReliableTask, failures: int, gate: str) -> None:
        started(self)
        run = runs(self)
        if run <= failures:
            raise ValueError("sold out")
        journal.wait_at(gate)
        finished(self)

    @task("rationed", downstream=RATION, on_expired="discard")
    def rationed(self: ReliableTask, n: str) -> None:
        started(self)
        finished(self)

    @task("total")
    def total(self: ReliableTask, numbers: list[int]) -> int:
        started(self)
        finished(self)
        return sum(numbers)


def produce(verb: str, *given: str) -> None:
    """Be a producer."""
    match verb, given:
        case "send", [name, task_id, args, options]:
            app.tasks[name].apply_async(json.loads(args), task_id=task_id, **json.loads(options))
        case "revoke", [task_id]:
            app.control.revoke(task_id)
        case _:
            raise SystemExit(f"unknown: {verb} {given}")


def serve() -> None:
    """Fork a process for each command, a line of JSON, and answer with its status and what it printed.

    A fork dies as any process does, and need not import all of Celery first.
    """
    for line in sys.stdin:
        command, *rest = json.loads(line)
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.dup2(write, 1)
            os.dup2(write, 2)
            status = 1
            try:
                (taskguard_command if command == "taskguard" else produce)(*rest)
                status = 0
            except SystemExit as exc:
                status = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
            except Exception:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        os.close(write)
        with os.fdopen(read) as output:
            printed = output.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([status, printed]), flush=True)


def taskguard_command(*words: str) -> None:
    """Be an operator."""
    cli(["-A", "tests.integration.crashapp", *words], prog_name="taskguard")


if "TEST_QUEUE" in os.environ:
    app = make_app(os.environ)
