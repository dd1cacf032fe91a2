"""An application whose servers do not answer, for the tests of the kit."""

from __future__ import annotations

from typing import Any

from celery import Celery

from taskguard import ReliableTask, install

NOWHERE = "redis://192.0.2.1:6379/0"
"""An address that never answers: a test that talked to it would not pass."""


def make_app() -> Celery:
    """An application as it is in production."""
    app = Celery("shop", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
    install(app, store=NOWHERE, namespace="shop")
    return app


def declare(app: Celery, function: Any = None, **options: Any) -> Any:
    """Declare a task on *app*; a reliable one unless told otherwise."""
    made = app.task(**{"base": ReliableTask, "shared": False, **options})
    return made if function is None else made(function)


def add(x: int, y: int = 0) -> int:
    """A body."""
    return x + y


def noting(ran: list[int]) -> Any:
    """A body that notes its argument in *ran*."""

    def note(n: int) -> None:
        ran.append(n)

    return note
