"""The tasks of the integration tests. Each writes to the journal that it started, and that it finished."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals

import taskguard
from taskguard import ReliableTask, Retry
from tests.integration.journal import Journal


class Abrupt(ReliableTask):
    """Dies when its run is completed in the store, before Celery has sent what follows: its child, or all of them."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        if self.custody.token:  # none where the result is replayed
            victim = {"child": os.getpid(), "worker": -os.getpgrp()}[result]
            os.kill(victim, signal.SIGKILL)
        return result


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application over the servers named in *environ*; *settings* go to `taskguard.install`."""
    namespace, broker = environ["TASKGUARD_NAMESPACE"], environ["TEST_BROKER"]
    journal = Journal(environ["TEST_JOURNAL"], namespace)
    backend = environ.get("TEST_BACKEND", environ["TEST_JOURNAL"])
    app = Celery("tests.integration", broker=broker, backend=backend, set_as_current=False)
    transport = json.loads(environ.get("TEST_TRANSPORT", "{}"))
    if broker.startswith("redis"):
        transport["global_keyprefix"] = f"{namespace}."
    app.conf.update(
        task_default_queue=environ["TEST_QUEUE"],
        broker_transport_options=transport,
        result_backend_transport_options={"global_keyprefix": f"{namespace}."},
        worker_hijack_root_logger=False,
        **json.loads(environ.get("TEST_CONF", "{}")),
    )
    app.journal = journal
    taskguard.install(app, **settings).observers.add(journal.observe)

    @signals.worker_ready.connect(weak=False)
    def ready(sender: Any, **_: Any) -> None:
        journal.write("ready", name=sender.hostname)

    _declare(app, journal)
    return app


def _declare(app: Celery, journal: Journal) -> None:
    started, finished = journal.started, journal.finished

    @app.task(bind=True, name="work", base=ReliableTask, shared=False)
    def work(self: ReliableTask, value: int = 0) -> int:
        started(self)
        finished(self)
        return value

    @app.task(bind=True, name="held", base=ReliableTask, shared=False)
    def held(self: ReliableTask, gate: str) -> str:
        started(self)
        journal.wait_at(gate)
        finished(self)
        return gate

    @app.task(
        bind=True, name="limited", base=ReliableTask, shared=False, time_limit=1,
        retry=Retry(max_retries=1, first_delay=0.1, jitter="none"),
    )  # fmt: skip
    def limited(self: ReliableTask, gate: str) -> None:
        started(self)
        journal.wait_at(gate)
        finished(self)

    @app.task(bind=True, name="allotted", base=ReliableTask, shared=False, limited={"client": "{tenant}"})
    def allotted(self: ReliableTask, tenant: str) -> str:
        started(self)
        finished(self)
        return tenant

    @app.task(bind=True, name="poison", base=ReliableTask, shared=False)
    def poison(self: ReliableTask) -> None:
        started(self)
        os.kill(os.getpid(), signal.SIGKILL)

    @app.task(bind=True, name="retried", base=ReliableTask, shared=False, max_retries=3)
    def retried(self: ReliableTask, countdown: float) -> str:
        started(self)
        if self.request.retries == 0:
            raise self.retry(countdown=countdown)
        finished(self)
        return "second time"

    @app.task(bind=True, name="held_and_retried", base=ReliableTask, shared=False, max_retries=3)
    def held_and_retried(self: ReliableTask, gate: str) -> str:
        started(self)
        journal.wait_at(gate)
        if self.request.retries == 0:
            raise self.retry(countdown=0.1)
        finished(self)
        return gate

    @app.task(bind=True, name="add", base=ReliableTask, shared=False)
    def add(self: ReliableTask, left: object, right: object) -> str:
        started(self)
        finished(self)
        return f"{left}+{right}"

    @app.task(bind=True, name="abrupt", base=Abrupt, shared=False)
    def abrupt(self: ReliableTask, victim: str, gate: str) -> str:
        started(self)
        journal.wait_at(gate)
        finished(self)
        return victim
