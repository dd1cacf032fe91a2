"""The application of the scene of kills: one task, guarded or stock, whose every step is written down outside.

The steps of a message are written by signals of Celery and by the body: ``received`` by a worker's parent, ``entered``
by the child before anything of the task's own runs, ``started`` by the body, ``effect`` between its two halves, and
``completed`` by taskguard's event, or by Celery's success signal, which follows the storing of the result.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any, Literal

from celery import Celery, Task, signals

import taskguard
from taskguard import ReliableTask
from tests.integration.journal import Journal

Side = Literal["taskguard", "stock"]
TASK = "pay"
KEY = "order-{number}"


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application of the side in *environ*; *settings* go to `taskguard.install`."""
    namespace, broker = environ["TASKGUARD_NAMESPACE"], environ["TEST_BROKER"]
    journal = Journal(environ["TEST_JOURNAL"], namespace)
    app = Celery("tests.kills", broker=broker, backend=environ["TEST_JOURNAL"], set_as_current=False)
    app.conf.update(
        task_default_queue=environ["TEST_QUEUE"],
        broker_transport_options={"global_keyprefix": f"{namespace}."} if broker.startswith("redis") else {},
        broker_connection_retry_on_startup=True,
        result_backend_transport_options={"global_keyprefix": f"{namespace}."},
        worker_hijack_root_logger=False,
        **json.loads(environ.get("TEST_CONF", "{}")),
    )
    app.journal = journal
    guarded = environ["TEST_SIDE"] == "taskguard"
    if guarded:
        taskguard.install(app, **settings).observers.add(journal.observe)
    _declare(app, journal, guarded)
    return app


def _declare(app: Celery, journal: Journal, guarded: bool) -> None:
    options = (
        {"base": ReliableTask, "idempotency_key": KEY}
        if guarded
        else {"base": Task, "acks_late": True, "reject_on_worker_lost": True}
    )

    @app.task(bind=True, name=TASK, shared=False, **options)
    def pay(self: Task, number: int, before: float, after: float) -> int:
        run = {"task_id": self.request.id, "name": self.request.hostname}
        if guarded:
            run |= {"token": self.custody.token, "crashes": self.custody.crashes}
        journal.write("started", **run)
        time.sleep(before)
        journal.write("effect", **run)
        time.sleep(after)
        return number


def report(app: Celery, environ: Mapping[str, str]) -> None:
    """In a worker: write down what Celery does with messages."""
    journal = app.journal

    @signals.worker_ready.connect(weak=False)
    def ready(sender: Any, **_: Any) -> None:
        journal.write("ready", name=sender.hostname)

    @signals.task_received.connect(weak=False)
    def received(request: Any, **_: Any) -> None:
        journal.write("received", task_id=request.id, name=request.hostname)

    @signals.task_prerun.connect(weak=False)
    def entered(task_id: str, task: Task, **_: Any) -> None:
        journal.write("entered", task_id=task_id, name=task.request.hostname)

    if environ["TEST_SIDE"] == "stock":

        @signals.task_success.connect(weak=False)
        def completed(sender: Task, **_: Any) -> None:
            journal.write("completed", task_id=sender.request.id, name=sender.request.hostname)


if "TEST_SIDE" in os.environ:
    app = make_app(os.environ)
    report(app, os.environ)
