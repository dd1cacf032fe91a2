"""django-celery-outbox on the same database and broker, in a process of its own: ``insert`` and ``relay``.

Prints one line of JSON: what was measured. Its tables are made with ``migrate``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

from sqlalchemy import make_url

from tests.benchmarks.outboxturns import Spent, in_turns


def prepare(broker: str, queue: str) -> Any:
    """Django, configured for the database in the environment, and the rival's application."""
    import django
    from django.conf import settings

    url = make_url(os.environ["BENCH_DATABASE"])
    database = {"ENGINE": "django.db.backends.postgresql", "NAME": url.database, "USER": url.username or ""}
    database |= {"HOST": url.host or "", "PORT": str(url.port or 5432), "PASSWORD": url.password or ""}
    settings.configure(
        DATABASES={"default": database},
        INSTALLED_APPS=["django_celery_outbox"],
        USE_TZ=True,
        CELERY_OUTBOX_APP="tests.benchmarks.outboxrival.app",
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()
    logging.disable(logging.CRITICAL)
    import structlog
    from django_celery_outbox.app import OutboxCelery

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    app = OutboxCelery("rival", broker=broker, set_as_current=False)
    app.conf.update(task_default_queue=queue, task_ignore_result=True)
    if broker.startswith("amqp"):
        app.conf.broker_transport_options = {"confirm_publish": True}

    @app.task(name="charge", shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def charge(order_id: int, card: str) -> None:
        """Nothing."""

    return app


def insert(app: Any, count: int) -> dict[str, Spent]:
    """What a business transaction takes, "bare" and with a task "sent"."""
    from django.db import connection, transaction

    def business(number: int, *, sends: bool) -> None:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO bench_orders (number, card) VALUES (%s, %s)", [number, "x" * 50])
            if sends:
                app.tasks["charge"].apply_async((number,), {"card": "x" * 50})

    works = {"bare": lambda number: business(number, sends=False), "sent": lambda number: business(number, sends=True)}
    return in_turns(works, count)


def relay(app: Any, count: int) -> float:
    """Messages a second, with all of them waiting."""
    from django.db import transaction
    from django_celery_outbox.models import CeleryOutbox
    from django_celery_outbox.relay import Relay, RelayConfig

    CeleryOutbox.objects.all().delete()
    with transaction.atomic():
        for number in range(count):
            app.tasks["charge"].apply_async((number,), {"card": "x" * 50})
    options = {"batch_size": 500, "idle_time": 0.01, "backoff_time": 120, "max_retries": 5, "publish_concurrency": 1}
    options |= {"queue_snapshot_refresh_seconds": 5.0, "stale_timeout_seconds": 300, "send_timeout": 10.0}
    options |= {"shutdown_timeout": 30.0, "broker_outage_cooldown": 30.0, "max_backoff": 3600.0, "liveness_file": None}
    relaying = Relay(app=app, config=RelayConfig.from_options(options))
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1)
    started = time.perf_counter()
    while CeleryOutbox.objects.exists():
        relaying._processing()
    return count / (time.perf_counter() - started)


def main(verb: str, broker: str, queue: str, count: str) -> None:
    """Do it and print it."""
    app = prepare(broker, queue)
    if verb == "migrate":
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        print("{}")
    elif verb == "insert":
        print(json.dumps(insert(app, int(count))))
    else:
        print(json.dumps({"rate": relay(app, int(count))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
