"""The teller: what the worker's parent has to tell the result backend, told from a thread.

A result backend may be away for minutes, and Celery then waits for it. The parent's event loop must not: it feeds the
pool. Each telling ends with the acknowledgement of its message, so that what dies with the process is delivered again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from taskguard.events import Event, Observer
from taskguard.forks import undisturbed

STOP_PATIENCE = 10.0
"""Seconds a worker that stops waits for what is still to be told; what is left then is delivered again."""


class Teller:
    """A thread with a queue. What raises is told to *notify*, and the next is told."""

    def __init__(self, notify: Observer) -> None:
        self._notify = notify
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="taskguard-teller", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def tell(self, what: Callable[[], None]) -> None:
        """Do *what*, in order, soon."""
        self._queue.put(what)

    def stop(self) -> None:
        """Tell what is queued, as long as `STOP_PATIENCE` lasts."""
        self._queue.put(None)
        self._thread.join(timeout=STOP_PATIENCE)

    def _run(self) -> None:
        while (what := self._queue.get()) is not None:
            try:
                with undisturbed:
                    what()
            except Exception as exc:  # noqa: BLE001 (result backends raise what their drivers raise)
                self._notify(Event(name="announce_failed", detail=f"{type(exc).__name__}: {exc}"))
