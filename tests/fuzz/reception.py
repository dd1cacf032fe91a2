"""A worker's reception in this process: the real consumer, strategies, requests and gate, with a pool that runs inline.

A message is handed in as the transport would, and the answer says how it ended. What a real worker would die of leaves
`deliver` as an exception.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.app import trace
from celery.concurrency.solo import TaskPool
from celery.exceptions import TaskRevokedError
from celery.utils.timer2 import Timer
from celery.worker import state as worker_state
from kombu.message import Message

import taskguard
from taskguard import ReliableTask
from taskguard.celery.consumer import Consumer
from taskguard.record import Record, State


@dataclass
class Delivery:
    """What became of one message at the broker. ``answers`` are "ack", "reject" and "requeue", as they came."""

    answers: list[str] = field(default_factory=list)
    no_ack_consumers: tuple[str, ...] = ()

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        self.answers.append("ack")

    def basic_reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        self.answers.append("requeue" if requeue else "reject")


class Reception:
    """One application with a store in memory, a reliable task ``work`` with a key, and a plain one, ``plain``."""

    def __init__(self, namespace: str) -> None:
        self.runs: list[Any] = []
        self.app = Celery(f"fuzz-{namespace}", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(worker_hijack_root_logger=False, task_default_queue=namespace)
        taskguard.install(self.app, store="memory://", namespace=namespace)
        self._declare()
        self.app.finalize()
        trace.setup_worker_optimizations(self.app, "fuzz@test")
        for name, task in self.app.tasks.items():
            task.__trace__ = trace.build_tracer(name, task, self.app.loader, "fuzz@test", app=self.app)
        pool = TaskPool(1)
        pool.start()

        def handle(request: Any) -> None:
            with suppress(TaskRevokedError):
                request.execute_using_pool(pool)

        self.consumer = Consumer(
            handle,
            app=self.app,
            pool=pool,
            hostname="fuzz@test",
            timer=Timer(),
            controller=SimpleNamespace(state=worker_state, semaphore=None, app=self.app, use_eventloop=False),
            initial_prefetch_count=1,
        )
        self.consumer.update_strategies()
        self._receive = self.consumer.create_task_handler()

    def _declare(self) -> None:
        @self.app.task(name="work", base=ReliableTask, shared=False, idempotency_key="work:{order}", max_retries=2)
        def work(order: object = 0, *rest: object, **more: object) -> str:
            self.runs.append(order)
            return "done"

        @self.app.task(name="plain", shared=False)
        def plain(*args: object, **kwargs: object) -> str:
            self.runs.append(args)
            return "done"

    def deliver(
        self,
        body: Any,
        headers: Any,
        *,
        properties: Mapping[str, Any] | None = None,
        content_type: Any = "application/json",
        content_encoding: Any = "utf-8",
    ) -> Delivery:
        """Hand a message in as kombu's consumer does."""
        delivery = Delivery()
        message = Message(
            body=body,
            delivery_tag="tag",
            content_type=content_type,
            content_encoding=content_encoding,
            headers=headers,
            properties=properties,
            delivery_info={"exchange": "", "routing_key": "fuzz"},
            channel=delivery,
            accept={"application/json"},
        )
        if message.errors:
            message._reraise_error(self.consumer.on_decode_error)
        else:
            self._receive(message)
        self.consumer.perform_pending_operations()
        return delivery

    def records(self) -> list[Record]:
        """Everything the store knows."""
        return [record for state in State for record in self.app.taskguard.store.scan(state)]


def quiet() -> None:
    """Celery logs every message it refuses."""
    logging.disable(logging.CRITICAL)
