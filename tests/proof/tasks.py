"""The tasks of the proof, the same bodies for both contestants: ``celery -A tests.proof.tasks worker``."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from celery import Celery, Task, signals
from kombu import Queue

import taskguard
from taskguard import ReliableTask, Retry
from taskguard.downstream.service import Downstream
from taskguard.policies import TokenBucket
from tests.integration.journal import Journal
from tests.proof import verdicts

PER_SECOND = 5
CATCH_UP = 2
SHARED = Downstream("paced", rate=TokenBucket(PER_SECOND, burst=CATCH_UP))
"""What stock calls a ``rate_limit``, and each of its workers has for itself. Who comes late for a slot may catch up."""

LONG = 60.0
"""Seconds a body blocks that only a limit ends."""


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application of the contestant in *environ*; *settings* go to `taskguard.install`."""
    namespace, broker = environ["TASKGUARD_NAMESPACE"], environ["TEST_BROKER"]
    journal = Journal(environ["TEST_JOURNAL"], namespace)
    app = Celery("tests.proof", broker=broker, backend=environ["TEST_BACKEND"], set_as_current=False)
    transport = json.loads(environ.get("TEST_TRANSPORT", "{}"))
    if broker.startswith("redis"):
        transport["global_keyprefix"] = f"{namespace}."
    app.conf.update(
        task_default_queue=environ["TEST_QUEUE"],
        broker_transport_options=transport,
        broker_connection_retry_on_startup=True,
        result_backend_transport_options={"global_keyprefix": f"{namespace}."},
        worker_hijack_root_logger=False,
        **json.loads(environ.get("TEST_CONF", "{}")),
    )
    if queue := json.loads(environ.get("TEST_QUEUE_ARGUMENTS", "{}")):
        app.conf.task_queues = [Queue(environ["TEST_QUEUE"], queue_arguments=queue)]
    app.journal = journal
    options = json.loads(environ.get("TEST_OPTIONS", "{}"))
    guarded = environ["TEST_CONTESTANT"] == "taskguard"
    if guarded:
        taskguard.install(app, **settings).observers.add(journal.observe)

    @signals.worker_ready.connect(weak=False)
    def ready(sender: Any, **_: Any) -> None:
        journal.write("ready", name=sender.hostname)

    _declare(app, journal, guarded, options)
    return app


def _declare(app: Celery, journal: Journal, guarded: bool, options: Mapping[str, Any]) -> None:
    base = ReliableTask if guarded else Task

    def task(name: str, **own: Any) -> Callable[..., Any]:
        """A task of both contestants. ``retry=`` is a taskguard policy, and stock's autoretry."""
        if not guarded and (policy := own.pop("retry", None)) is not None:
            own |= {"max_retries": policy.max_retries, "autoretry_for": (Exception,), "retry_backoff": False,
                    "default_retry_delay": policy.first_delay}  # fmt: skip
        return app.task(bind=True, name=name, base=base, shared=False, **{**own, **options})

    def started(self: Task) -> None:
        held = self.custody if guarded else None
        more = {"token": held.token, "crashes": held.crashes} if held else {}
        journal.write("started", task_id=self.request.id, name=self.name, attempt=self.request.retries, **more)

    def finished(self: Task) -> None:
        journal.write("finished", task_id=self.request.id, name=self.name)

    def first(self: Task) -> bool:
        return journal.first(f"{self.name}:{self.request.id}")

    def die(task_id: str, victim: str) -> NoReturn:
        """SIGKILL this process ("child"), or the worker's main process ("main")."""
        prefork = os.getpid() != os.getpgrp()
        pid = os.getpgrp() if victim == "main" else os.getpid()
        journal.write("killing", task_id=task_id, name=victim, pid=pid)
        os.kill(pid, signal.SIGKILL)
        time.sleep(LONG if prefork else 0)
        raise AssertionError("SIGKILL was survived")

    @task("work")
    def work(self: Task, value: int = 0) -> int:
        started(self)
        finished(self)
        return value

    @task("held")
    def held(self: Task, gate: str) -> str:
        started(self)
        journal.wait_at(gate)
        finished(self)
        return gate

    @task("nap")
    def nap(self: Task, seconds: float) -> float:
        started(self)
        time.sleep(seconds)
        finished(self)
        return seconds

    @task("frail")
    def frail(self: Task, victim: str = "child") -> str:
        """Its first run dies in mid-body."""
        started(self)
        if first(self):
            die(self.request.id, victim)
        finished(self)
        return victim

    @task("poison")
    def poison(self: Task, victim: str = "child") -> None:
        """Every run dies in mid-body."""
        started(self)
        die(self.request.id, victim)

    @task("crash_after")
    def crash_after(self: Task) -> None:
        """Its first run dies when its result is stored and its message not acknowledged."""
        started(self)
        finished(self)

    @task("retry_then_crash", max_retries=3)
    def retry_then_crash(self: Task, countdown: float) -> int:
        """Asks for a retry once, and that run dies when the retry is published and its message not acknowledged."""
        started(self)
        if self.request.retries == 0:
            raise self.retry(countdown=countdown)
        finished(self)
        return self.request.retries

    @signals.task_postrun.connect(weak=False)
    def after(task_id: str, task: Task, **_: Any) -> None:
        # Each delivery of the same run dies no more than once, or a redelivery could never be acknowledged.
        doomed = task.name == "crash_after" or (task.name == "retry_then_crash" and task.request.retries == 0)
        if doomed and journal.first(f"after:{task_id}"):
            die(task_id, "child")

    @task("retried", max_retries=3)
    def retried(self: Task, countdown: float) -> int:
        started(self)
        if self.request.retries == 0:
            raise self.retry(countdown=countdown)
        finished(self)
        return self.request.retries

    @task("stuck", retry=Retry(max_retries=1, first_delay=0.1, jitter="none"))
    def stuck(self: Task, times: int) -> int:
        """Its first *times* runs block until a limit ends them."""
        started(self)
        if len(journal.entries("started", self.request.id)) <= times:
            time.sleep(LONG)
        finished(self)
        return times

    @task("patient", max_retries=0)
    def patient(self: Task, seconds: float) -> float:
        """Blocks where a signal, or another greenlet, can interrupt it; tells nothing but its end."""
        started(self)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.1)
        finished(self)
        return seconds

    @task("broken")
    def broken(self: Task) -> None:
        started(self)
        raise ValueError("no such card")

    @task("paced", **({"downstream": SHARED} if guarded else {"rate_limit": f"{PER_SECOND}/s"}))
    def paced(self: Task, value: int) -> int:
        started(self)
        finished(self)
        return value

    @task("add")
    def add(self: Task, left: object, right: object) -> str:
        started(self)
        finished(self)
        return f"{left}+{right}"

    verdicts.declare(task, started, finished)


if "TEST_CONTESTANT" in os.environ:
    app = make_app(os.environ)
