"""What the benchmarked workers run: the same bodies as stock Celery tasks, or as reliable ones.

``BENCH_SIDE`` is "stock" (Celery without taskguard, late acknowledgement) or "taskguard".
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from celery import Celery
from redis import Redis

from taskguard import ReliableTask, install

STOCK, TASKGUARD = "stock", "taskguard"
PREFETCH = 1


def make_app(environ: Mapping[str, str]) -> Celery:
    """The application of one side, as its producer and its worker have it."""
    side, namespace = environ["BENCH_SIDE"], environ["BENCH_NAMESPACE"]
    backend = environ.get("BENCH_BACKEND") or None
    app = Celery("bench", broker=environ["BENCH_BROKER"], backend=backend, set_as_current=False)
    app.conf.update(
        task_default_queue=f"{namespace}.tasks",
        task_acks_late=True,
        worker_prefetch_multiplier=PREFETCH,
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
    )
    options: dict[str, object] = {}
    if side == TASKGUARD:
        install(app, store=environ["BENCH_STORE"], namespace=namespace)
        options["base"] = ReliableTask

    @app.task(name="noop", shared=False, ignore_result=backend is None, **options)  # type: ignore[untyped-decorator]
    def noop() -> None:
        """Nothing."""

    @app.task(name="mark", shared=False, ignore_result=True, **options)  # type: ignore[untyped-decorator]
    def mark(name: str) -> None:
        with Redis.from_url(environ["BENCH_MARKS"]) as client:
            client.rpush(f"{namespace}.marks", f"{name} {time.time()!r}")

    return app


app = make_app(os.environ) if "BENCH_SIDE" in os.environ else None
