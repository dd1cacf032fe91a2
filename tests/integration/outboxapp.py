"""The application of the outbox's tests, and relays of it that may die: ``taskguard -A … outbox relay``.

A relay with ``TEST_DIES_AT`` kills itself when it gets there the second time, with work before and behind it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery

from taskguard import ReliableTask, install
from taskguard.celery.broker import BrokerPublisher
from taskguard.stores.sql import handing
from taskguard.stores.sql.outbox import SQLOutbox

POINTS: dict[str, tuple[Any, str]] = {
    "hand_over": (SQLOutbox, "hand_over"),
    "dispatch": (BrokerPublisher, "dispatch"),
    "settle": (handing, "settle"),
}
"""The steps of a relay: the whole of a batch, its publishing, and what is made of the broker's answer."""

NUMBER = 2


def make_app(environ: Mapping[str, str]) -> Celery:
    """The shop, over the servers named in *environ*."""
    namespace = environ["OUTBOX_NAMESPACE"]
    app = Celery("tests.integration.outboxapp", broker=environ["OUTBOX_BROKER"], set_as_current=False)
    app.conf.task_default_queue = f"{namespace}.tasks"
    install(app, store=environ["OUTBOX_STORE"], namespace=namespace, lease=2)

    @app.task(name="order", base=ReliableTask, shared=False, ignore_result=True)
    def order(key: str, number: int) -> None: ...

    return app


def _die_at(point: str) -> None:
    side, _, name = point.partition(" ")
    owner, attribute = POINTS[name]
    operation: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if side == "before" and calls == NUMBER:
            _die()
        answer = operation(*args, **kwargs)
        if side == "after" and calls == NUMBER:
            _die()
        return answer

    setattr(owner, attribute, dying)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


if "OUTBOX_STORE" in os.environ:
    if "TEST_DIES_AT" in os.environ:
        _die_at(os.environ["TEST_DIES_AT"])
    app = make_app(os.environ)
