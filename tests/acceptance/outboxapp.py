"""The application of the outbox's scene: orders are placed in a database, and done in it by transactional tasks.

``python -m tests.acceptance.outboxapp PRODUCER ORDERS SEED`` is one producer. It rolls half of its transactions back.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert
from sqlalchemy.orm import Session

import taskguard
from taskguard import ReliableTask, Retry
from tests.integration.journal import Journal

CUSTOMERS = 5
"""Of each producer: the ordering keys."""
AUDIT = "audit"
"""The task that nobody runs: its queue shows in which order messages were published."""


def orders_of(namespace: str) -> tuple[Table, Table]:
    """The orders that were placed, and those that were done; what is done twice is there twice."""
    metadata = MetaData()
    placed, done = (
        Table(
            f"{name}_{namespace}",
            metadata,
            Column("id", Integer, primary_key=True),
            Column("customer", String(20), nullable=False),
            Column("number", Integer, nullable=False),
            mysql_engine="InnoDB",
        )
        for name in ("placed", "done")
    )
    return placed, done


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application over the servers in *environ*; *settings* go to `taskguard.install`."""
    namespace, broker = environ["TASKGUARD_NAMESPACE"], environ["TEST_BROKER"]
    journal = Journal(environ["TEST_JOURNAL"], namespace)
    app = Celery("tests.outbox", broker=broker, backend=environ["TEST_JOURNAL"], set_as_current=False)
    app.conf.update(
        task_default_queue=environ["TEST_QUEUE"],
        task_routes={AUDIT: {"queue": f"{namespace}.audit"}},
        task_ignore_result=True,
        broker_transport_options={"global_keyprefix": f"{namespace}."} if broker.startswith("redis") else {},
        result_backend_transport_options={"global_keyprefix": f"{namespace}."},
        worker_hijack_root_logger=False,
    )
    app.journal = journal
    taskguard.install(app, **settings)
    _, done = orders_of(namespace)

    @signals.worker_ready.connect(weak=False)
    def ready(sender: Any, **_: Any) -> None:
        journal.write("ready", name=sender.hostname)

    @app.task(
        bind=True, name="fulfil", base=ReliableTask, shared=False, transactional=True, max_crashes=50,
        retry=Retry(max_retries=50, first_delay=0.2, max_delay=2), idempotency_key="{customer}:{number}",
    )  # fmt: skip
    def fulfil(self: ReliableTask, customer: str, number: int) -> None:
        self.session.execute(insert(done).values(customer=customer, number=number))

    @app.task(name=AUDIT, base=ReliableTask, shared=False, idempotency_key="{customer}:{number}")
    def audit(customer: str, number: int) -> None: ...

    return app


def produce(producer: str, orders: int, seed: int) -> None:
    """Place orders, each in a transaction with the two tasks it sends; half of them are rolled back."""
    chance = random.Random(f"{seed}/{producer}")
    placed, _ = orders_of(os.environ["TASKGUARD_NAMESPACE"])
    numbers = dict.fromkeys((f"{producer}.{each}" for each in range(CUSTOMERS)), 0)
    kept = [True, False] * (orders // 2) + [True] * (orders % 2)
    chance.shuffle(kept)
    engine = create_engine(os.environ["TASKGUARD_STORE"])
    for keeps in kept:
        customer = chance.choice(list(numbers))
        numbers[customer] += 1
        order = {"customer": customer, "number": numbers[customer]}
        with Session(engine) as session:
            session.execute(insert(placed).values(order))
            for task in ("fulfil", AUDIT):
                app.tasks[task].apply_async(kwargs=order, session=session, ordering_key=customer)
            (session.commit if keeps else session.rollback)()


if "TEST_QUEUE" in os.environ:
    app = make_app(os.environ)

if __name__ == "__main__":
    produce(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
