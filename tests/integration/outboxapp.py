"""The application of the outbox's tests, and relays of it that may die: ``taskguard -A … outbox relay``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from celery import Celery

from taskguard import ReliableTask, install
from taskguard.cli import cli
from tests.integration.crashpoints import relay_steps

NUMBER = 4
"""The time at which a relay dies at its step: with work before it and behind it, and of a batch, some in hand."""


def make_app(environ: Mapping[str, str]) -> Celery:
    """The shop, over the servers named in *environ*."""
    namespace = environ["OUTBOX_NAMESPACE"]
    app = Celery("tests.integration.outboxapp", broker=environ["OUTBOX_BROKER"], set_as_current=False)
    app.conf.task_default_queue = f"{namespace}.tasks"
    install(app, store=environ["OUTBOX_STORE"], namespace=namespace, lease=2)

    @app.task(name="order", base=ReliableTask, shared=False, ignore_result=True)
    def order(key: str, number: int) -> None: ...

    return app


def relay(environ: Mapping[str, str], options: Sequence[str], log: Path, dies_at: str = "") -> None:
    """Be a relay. With *dies_at*, such as "before handing.settle", it kills itself there."""
    global app
    os.environ.update(environ)
    with log.open("wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    if dies_at:
        _die_at(dies_at)
    app = make_app(environ)
    cli(["-A", __name__, "outbox", "relay", "--poll", "0.1s", *options], prog_name="taskguard")


def _die_at(point: str) -> None:
    side, _, name = point.partition(" ")
    owner, attribute = relay_steps()[name]
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
    app = make_app(os.environ)
