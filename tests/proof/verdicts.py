"""Tasks that end by raising one of Celery's verdicts: Ignore and Reject."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery import Task
from celery.exceptions import Ignore, Reject

Mark = Callable[[Task], None]


def declare(task: Callable[..., Any], started: Mark, finished: Mark) -> None:
    """Add them. *task* declares one, *started* and *finished* write the journal's lines."""

    @task("ignoring")
    def ignoring(self: Task, *before: object) -> None:
        started(self)
        raise Ignore

    @task("rejecting")
    def rejecting(self: Task, *before: object) -> None:
        started(self)
        raise Reject("not mine")

    @task("stubborn", autoretry_for=(Exception,), max_retries=2, default_retry_delay=0.2)
    def stubborn(self: Task) -> None:
        """Rejects, though every exception of it is to be retried."""
        started(self)
        raise Reject("not mine")

    def turned_away(self: Task, until: float) -> float:
        """Is rejected and requeued, until a moment."""
        started(self)
        if time.time() < until:
            raise Reject("not now", requeue=True)
        finished(self)
        return until

    task("turned_away")(turned_away)
    task("turned_away_late", acks_late=True)(turned_away)

    @task("total")
    def total(self: Task, values: list[object]) -> int:
        """The body of a chord."""
        started(self)
        finished(self)
        return len(values)
