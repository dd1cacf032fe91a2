"""Durable revoking: a revocation is a record in the store, not a set in a worker's memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import Celery
from celery.worker.control import Panel
from celery.worker.control import revoke as celery_revoke

from taskguard.celery.runtime import Runtime, runtime_of
from taskguard.errors import StoreError
from taskguard.events import Event
from taskguard.lifecycle import PUBLISHED_RETENTION


class DurableControlMixin:
    """Put in front of the application's control class by `taskguard.install`."""

    app: Celery

    def revoke(self, task_id: Any, *args: Any, **options: Any) -> Any:
        """Celery's ``app.control.revoke``; the revocation also stands when no worker is alive to hear it."""
        record_revocation(runtime_of(self.app), task_id)
        return super().revoke(task_id, *args, **options)  # type: ignore[misc]


def record_revocation(runtime: Runtime, task_id: str | Iterable[str]) -> None:
    """Keep the revocation as long as a message may be waiting somewhere. Raises StoreUnavailable."""
    ids = [task_id] if isinstance(task_id, str) else list(task_id)
    runtime.store.revoke(ids, retention=max(PUBLISHED_RETENTION, runtime.settings.retention))


@Panel.register(name="revoke", type="control", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """Revoke task by task id (or list of ids), durably."""
    runtime = getattr(state.app, "taskguard", None)
    if isinstance(runtime, Runtime):
        try:
            record_revocation(runtime, task_id)
        except StoreError as exc:
            runtime.observers(Event(name="store_unavailable", detail=f"revoking {task_id}: {exc}"))
    return celery_revoke(state, task_id, terminate, signal, **options)
