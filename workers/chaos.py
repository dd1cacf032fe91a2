"""What `taskguard demo` loads into its workers beside the tasks: ``celery -A workers.app worker -I workers.chaos``.

A *poison* order kills its process just before it would call the bank, as a bug in a C library would. And every message
the broker hands to a worker is noted in ``CHAOS_JOURNAL``, whatever it is and whatever becomes of it. With
``CHAOS_VISIBILITY_TIMEOUT`` a Redis broker hands out what a dead worker had after so many seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from celery import bootsteps, current_app


def die_of_poison(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: no code of the task needs to know."""
    if event == "urllib.Request" and b'"poison-' in (args[1] or b""):
        os.kill(os.getpid(), signal.SIGKILL)


class Deliveries(bootsteps.StartStopStep):  # type: ignore[misc]
    """Note the id of every message as it arrives; one line each, so that several workers can share the journal."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        make_handler = parent.create_task_handler

        def create_task_handler(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            handle = make_handler(*args, **kwargs)

            def on_message(message: Any) -> Any:
                with open(os.environ["CHAOS_JOURNAL"], "a") as journal:
                    journal.write(f"{(message.headers or {}).get('id', '?')}\n")
                return handle(message)

            return on_message

        parent.create_task_handler = create_task_handler


if "CHAOS_JOURNAL" in os.environ:
    sys.addaudithook(die_of_poison)
    current_app.steps["consumer"].add(Deliveries)
    if "CHAOS_VISIBILITY_TIMEOUT" in os.environ:
        current_app.conf.broker_transport_options |= {
            "visibility_timeout": float(os.environ["CHAOS_VISIBILITY_TIMEOUT"]),
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
