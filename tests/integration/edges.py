"""The tasks at the edges of a run: what fails before the body, after it, or takes the process along.

``celery -A tests.integration.edges worker``. They join those of `tests.integration.tasks`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals

from taskguard import ReliableTask, Retry
from tests.integration import tasks
from tests.integration.journal import Journal

BLOCKED_MAX_CRASHES = 2


class Prepared(ReliableTask):
    """Its preparation fails the first time, or every time."""

    abstract = True
    retry_policy = Retry(max_retries=1, first_delay=0.1, jitter="none")

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.app.journal.write("prepared", task_id=task_id)
        match args:
            case ["once"] if self.request.retries == 0:
                raise ConnectionError("the bank is away")
            case ["never"]:
                raise ValueError("no such bank")


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application of `tests.integration.tasks`, with these tasks added."""
    app = tasks.make_app(environ, **settings)
    _declare(app, app.journal)
    return app


def _declare(app: Celery, journal: Journal) -> None:
    started, finished = journal.started, journal.finished

    @app.task(bind=True, name="single", base=ReliableTask, shared=False, unique_for=60, idempotency_key="single:{n}")
    def single(self: ReliableTask, n: object) -> str:
        started(self)
        finished(self)
        return f"single {n}"

    @app.task(bind=True, name="ordered", base=ReliableTask, shared=False, idempotency_key=lambda order: order["id"])
    def ordered(self: ReliableTask, order: dict[str, Any]) -> None:
        started(self)
        finished(self)

    @app.task(bind=True, name="hurried", base=ReliableTask, shared=False, soft_time_limit=3)
    def hurried(self: ReliableTask, gate: str) -> str:
        started(self)
        journal.wait_at(gate)
        finished(self)
        return gate

    @app.task(bind=True, name="blocked", base=ReliableTask, shared=False, time_limit=3, max_crashes=BLOCKED_MAX_CRASHES)
    def blocked(self: ReliableTask, times: int) -> int:
        started(self)
        finished(self)
        return times

    @signals.task_prerun.connect(sender=blocked, weak=False)
    def block(task_id: str, args: Any, **_: Any) -> None:
        journal.write("prerun", task_id=task_id)
        if len(journal.entries("prerun", task_id)) <= args[0]:
            time.sleep(60)

    @app.task(bind=True, name="prepared", base=Prepared, shared=False)
    def prepared(self: ReliableTask, fails: str) -> str:
        started(self)
        finished(self)
        return fails

    @app.task(bind=True, name="leaving", base=ReliableTask, shared=False, max_crashes=2)
    def leaving(self: ReliableTask) -> None:
        started(self)
        sys.exit(3)

    @app.task(
        bind=True, name="greedy", base=ReliableTask, shared=False,
        retry=Retry(max_retries=1, first_delay=0.1, jitter="none", retry_on=(MemoryError,)),
    )  # fmt: skip
    def greedy(self: ReliableTask) -> None:
        started(self)
        raise MemoryError("all of it")

    @app.task(bind=True, name="quiet", base=ReliableTask, shared=False, ignore_result=True)
    def quiet(self: ReliableTask) -> None:
        started(self)
        finished(self)


if "TEST_QUEUE" in os.environ:
    app = make_app(os.environ)
