"""The application of the result tests: every task exists plain and reliable, with the same body.

``celery -A tests.integration.resultapp worker``. Results are kept where ``TEST_BACKEND`` says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery, Task, group, signals

import taskguard
from taskguard import ReliableTask
from tests.integration.journal import Journal

KINDS: dict[str, type[Task]] = {"plain": Task, "reliable": ReliableTask}


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application over the servers named in *environ*; *settings* go to `taskguard.install`."""
    namespace, broker = environ["TASKGUARD_NAMESPACE"], environ["TEST_BROKER"]
    journal = Journal(environ["TEST_JOURNAL"], namespace)
    app = Celery("tests.results", broker=broker, backend=environ["TEST_BACKEND"], set_as_current=False)
    app.conf.update(
        task_default_queue=environ["TEST_QUEUE"],
        broker_transport_options={"global_keyprefix": f"{namespace}."} if broker.startswith("redis") else {},
        worker_hijack_root_logger=False,
        **json.loads(environ.get("TEST_CONF", "{}")),
    )
    app.journal = journal
    taskguard.install(app, **settings)

    @signals.worker_ready.connect(weak=False)
    def ready(sender: Any, **_: Any) -> None:
        journal.write("ready", name=sender.hostname)

    for kind, base in KINDS.items():
        _declare(app, journal, kind, base)
    return app


def _declare(app: Celery, journal: Journal, kind: str, base: type[Task]) -> None:
    def task(name: str, **options: Any) -> Callable[..., Any]:
        return app.task(name=f"{kind}.{name}", base=base, bind=True, shared=False, acks_late=True, **options)

    def sibling(name: str) -> Task:
        return app.tasks[f"{kind}.{name}"]

    @task("echo")
    def echo(self: Task, value: Any, label: str = "") -> Any:
        return value

    @task("quiet", ignore_result=True)
    def quiet(self: Task, value: Any) -> Any:
        return value

    @task("add")
    def add(self: Task, left: int, right: int) -> int:
        return left + right

    @task("total")
    def total(self: Task, numbers: list[int]) -> int:
        return sum(numbers)

    @task("parent")
    def parent(self: Task) -> str:
        """Sends a task and a group of two."""
        sibling("echo").delay("child")
        group(sibling("echo").s(number) for number in range(2)).apply_async()
        return "sent"

    @task("opaque")
    def opaque(self: Task) -> object:
        """Returns what no serializer takes."""
        return lambda: None

    @task("again", max_retries=2)
    def again(self: Task) -> int:
        if not self.request.retries:
            raise self.retry(countdown=0.1)
        return int(self.request.retries)

    @task("delegate")
    def delegate(self: Task) -> Any:
        raise self.replace(sibling("add").s(20, 3))

    @task("broken")
    def broken(self: Task) -> None:
        raise ValueError("no such card")

    @task("held")
    def held(self: Task, gate: str) -> str:
        journal.wait_at(gate)
        return gate


if "TEST_QUEUE" in os.environ:
    app = make_app(os.environ)
