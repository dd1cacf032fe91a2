"""The result backend of a rehearsal: a dictionary."""

from __future__ import annotations

from typing import Any

from celery import states
from celery.backends.base import KeyValueStoreBackend


class Results(KeyValueStoreBackend):  # type: ignore[misc]
    """Celery's result backend in this process. Nobody works while a test waits, so waiting fails at once."""

    implements_incr = True
    supports_native_join = False
    persistent = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kept: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """The value of *key*."""
        return self._kept.get(key)

    def mget(self, keys: Any) -> list[Any]:
        """The values of *keys*."""
        return [self._kept.get(key) for key in keys]

    def set(self, key: Any, value: Any) -> None:
        """Keep *value*."""
        self._kept[key] = value

    def delete(self, key: Any) -> None:
        """Forget *key*."""
        self._kept.pop(key, None)

    def incr(self, key: Any) -> int:
        """Count a chord's part."""
        count: int = self._kept.get(key, 0) + 1
        self._kept[key] = count
        return count

    def expire(self, key: Any, value: Any) -> None:
        """Nothing is kept longer than a test."""

    def wait_for(self, task_id: str, *args: Any, **options: Any) -> Any:
        """The end of a task that has ended."""
        meta = self.get_task_meta(task_id)
        if meta["status"] not in states.READY_STATES:
            raise AssertionError(f"task {task_id} has not ended ({meta['status']}); call drain() before get()")
        return meta
