"""Celery's result and the store's completion in one step, where both are on one Redis server.

Otherwise Celery's tracer writes the result itself, after the completion, in two more round trips. What is written is
what the backend would have written: its key, its encoding, its expiry, and the message on its channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taskguard.custody import ResultEntry

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask

SUCCESS = "SUCCESS"


def entry_of(task: ReliableTask, request: Any, value: object) -> ResultEntry | None:
    """The result as the backend would keep it. None: Celery is to write it, or nobody."""
    if request.is_eager or _ignored(task, request):
        return None
    if request.callbacks or request.chain:
        return None  # they are published first, and the result names them as its children
    backend = task.backend
    server = _server(backend)
    if server is None or not task.guard.store.writes_results_to(*server):
        return None
    try:
        meta = backend._get_result_meta(
            result=backend.encode_result(value, SUCCESS), state=SUCCESS, traceback=None, request=request
        )
        payload = backend.encode({**meta, "task_id": request.id})
        key = backend.get_key_for_task(request.id)
    except Exception:  # noqa: BLE001 (whatever a serializer raises, the tracer will meet it again and report it)
        return None
    return ResultEntry(int(backend.connparams["db"] or 0), _bytes(key), _bytes(payload), int(backend.expires or 0))


def _ignored(task: ReliableTask, request: Any) -> bool:
    asked = vars(request).get("ignore_result")
    return bool(task.ignore_result if asked is None else asked)


def _server(backend: Any) -> tuple[str, int, str] | None:
    """Host, port and user of a plain Redis backend; None for others, and for subclasses, which may store elsewhere."""
    kind = type(backend)
    if (kind.__module__, kind.__name__) != ("celery.backends.redis", "RedisBackend"):
        return None
    host, port = backend.connparams.get("host"), backend.connparams.get("port")
    return (host, int(port), backend.connparams.get("username") or "") if host and port else None


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
