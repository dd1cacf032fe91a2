"""The application of the beat tests: ``celery -A tests.integration.beatapp beat``. Its entries are due often."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from celery import Celery

from taskguard import ReliableTask
from tests.integration import tasks


def make_app(environ: Mapping[str, str], **settings: Any) -> Celery:
    """The application of `tests.integration.tasks`, with a task that tells which tick it is."""
    app = tasks.make_app(environ, **settings)

    @app.task(bind=True, name="ticked", base=ReliableTask, shared=False)
    def ticked(self: ReliableTask) -> None:
        app.journal.write("ticked", task_id=self.request.id, detail=self.custody.envelope.key)

    @app.task(bind=True, name="plain", shared=False)
    def plain(self: Any) -> None:
        app.journal.write("plain", task_id=self.request.id)

    app.conf.beat_schedule = {
        "second": {"task": "ticked", "schedule": 1.0},
        "third": {"task": "plain", "schedule": 3.0},
    }
    return app


if "TEST_QUEUE" in os.environ:
    app = make_app(os.environ)
