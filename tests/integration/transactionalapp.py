"""The application of the transactional tests: ``celery -A tests.integration.transactionalapp worker``.

Its effects are rows of a table of the test's own, with nothing unique about them: what happens twice is there twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from celery import Celery, chain, chord, group
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, text, update

from taskguard import ReliableTask, Retry
from tests.integration import crashpoints, tasks


def effects_of(namespace: str) -> Table:
    """The effects of a test."""
    return Table(
        f"effects_{namespace}",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("what", String(100), nullable=False),
        Column("token", String(40), nullable=False),
        mysql_engine="InnoDB",
    )


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application of `tests.integration.tasks`, with these tasks added."""
    app = tasks.make_app(environ, **settings)
    _declare(app, effects_of(environ["TASKGUARD_NAMESPACE"]))
    crashpoints.install_steps(crashpoints.transaction_steps(), environ, app.journal)
    return app


def _declare(app: Celery, effects: Table) -> None:
    journal = app.journal
    retry = Retry(max_retries=5, first_delay=0.1)

    def task(name: str, **options: Any) -> Any:
        return app.task(
            bind=True, name=name, base=ReliableTask, shared=False, transactional=True, retry=retry, max_crashes=20,
            **options,
        )  # fmt: skip

    def write(self: ReliableTask, what: str) -> None:
        self.session.execute(insert(effects).values(what=what, token=str(self.custody.token)))

    @task("order", idempotency_key="order:{number}")
    def order(self: ReliableTask, number: int, manner: str = "") -> str:
        journal.started(self)
        write(self, f"order {number}")
        if manner == "gathers":
            gather(app.tasks["ship"], number)
        else:
            app.tasks["ship"].delay(number)
        if manner == "stumbles" and journal.first(f"order {number}"):
            raise ConnectionError("the first time")
        journal.finished(self)
        return f"ordered {number}"

    @task("ship", idempotency_key="ship:{number}")
    def ship(self: ReliableTask, number: int | str) -> None:
        journal.started(self)
        write(self, f"ship {number}")
        journal.finished(self)

    @task("gated")
    def gated(self: ReliableTask, gate: str) -> str:
        write(self, f"gated {gate}")
        journal.started(self)
        journal.wait_at(gate)
        journal.finished(self)
        return gate

    @task("slow", soft_time_limit=1)
    def slow(self: ReliableTask, name: str, swallow: bool) -> None:
        write(self, f"slow {name}")
        if self.request.retries == 0:
            mysql = self.session.get_bind().dialect.name == "mysql"
            try:
                self.session.execute(text("SELECT SLEEP(30)" if mysql else "SELECT pg_sleep(30)"))
            except SoftTimeLimitExceeded:
                if not swallow:
                    raise
        journal.finished(self)

    @task("crossing")
    def crossing(self: ReliableTask, first: str, second: str, gate: str) -> None:
        for what in (first, second):
            self.session.execute(update(effects).where(effects.c.what == what).values(token=self.request.id))
            if what == first:
                journal.started(self)
                journal.wait_at(gate)
        write(self, f"crossed {gate}")
        journal.finished(self)


def gather(ship: Any, number: int) -> None:
    """Ship when four others have, in two chains; and save a group, of which the result backend is told by itself."""
    parts = [chain(ship.si(f"{number}{side}1"), ship.si(f"{number}{side}2")) for side in "ab"]
    chord(parts, ship.si(number), app=ship.app)()
    group(ship.si(f"{number}c"), app=ship.app).apply_async().save()


if "TEST_QUEUE" in os.environ:
    app = make_app(os.environ)
