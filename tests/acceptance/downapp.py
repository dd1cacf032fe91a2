"""The application of the scenes of a narrow downstream: one task that calls it, one that only runs beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals

import taskguard
from taskguard import ReliableTask, Retry
from taskguard.downstream.service import Downstream
from taskguard.policies import CircuitBreaker, Concurrency, TokenBucket
from tests.acceptance import narrow
from tests.integration.journal import Journal

NAME = "narrow"


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application over the servers in *environ*; *settings* go to `taskguard.install`."""
    namespace, broker = environ["TASKGUARD_NAMESPACE"], environ["TEST_BROKER"]
    journal = Journal(environ["TEST_JOURNAL"], namespace)
    app = Celery("tests.downstream", broker=broker, backend=environ["TEST_JOURNAL"], set_as_current=False)
    app.conf.update(
        task_default_queue=environ["TEST_QUEUE"],
        broker_transport_options={"global_keyprefix": f"{namespace}."} if broker.startswith("redis") else {},
        result_backend_transport_options={"global_keyprefix": f"{namespace}."},
        worker_hijack_root_logger=False,
        **json.loads(environ.get("TEST_CONF", "{}")),
    )
    app.journal = journal
    taskguard.install(app, **settings).observers.add(journal.observe)
    app.narrow = declared(json.loads(environ["TEST_DOWNSTREAM"]))

    @signals.worker_ready.connect(weak=False)
    def ready(sender: Any, **_: Any) -> None:
        journal.write("ready", name=sender.hostname)

    _declare(app, journal, int(environ["TEST_NARROW"]))
    return app


def declared(options: Mapping[str, Any]) -> Downstream:
    """The downstream as the scene declares it."""
    circuit = options.get("circuit")
    return Downstream(
        NAME,
        rate=TokenBucket(options["rate"], burst=options["burst"]) if "rate" in options else None,
        concurrency=Concurrency(**options["concurrency"]) if "concurrency" in options else None,
        circuit=None if circuit is None else CircuitBreaker(**circuit, expected=(narrow.Trouble, OSError)),
        max_wait=options.get("max_wait", 0.0),
    )


def _declare(app: Celery, journal: Journal, port: int) -> None:
    @app.task(
        bind=True, name="call", base=ReliableTask, shared=False, downstream=app.narrow,
        retry=Retry(max_retries=5, first_delay=0.2),
    )  # fmt: skip
    def call(self: ReliableTask, number: int) -> int:
        return narrow.call(port, number)

    @app.task(bind=True, name="hold", base=ReliableTask, shared=False, downstream=app.narrow)
    def hold(self: ReliableTask, gate: str) -> str:
        journal.started(self)
        journal.wait_at(gate)
        journal.finished(self)
        return gate

    @app.task(bind=True, name="beside", base=ReliableTask, shared=False)
    def beside(self: ReliableTask, number: int) -> int:
        journal.started(self)
        return number


if "TEST_DOWNSTREAM" in os.environ:
    app = make_app(os.environ)
