"""Plain calls: a task and its arguments, sent in a transaction. Most sends are no more than that.

Celery's way to a message leads through its publishing and retry machinery, which takes longer than all that a send into
a transaction needs. The message of a plain call is made here instead, and is the same: its headers are Celery's own, of
which only those are written anew that differ from call to call. What is not plain goes Celery's way: delays, links and
canvas, stamps, exchanges, compression, other serializers than JSON, routers of the user's own, listeners to the signals
of publishing, calls inside a run, and a Celery whose way of sending was replaced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from celery.app import amqp as celery_amqp
from celery.app import base as celery_base
from celery.app.routes import MapRoute, Router
from kombu.entity import Queue
from kombu.serialization import registry
from kombu.utils.json import JSONEncoder, dumps

from taskguard import forks
from taskguard.celery.flaws import is_name
from taskguard.headers import KEY

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask

_before, _after, _sent = signals.before_task_publish, signals.after_task_publish, signals.task_sent
_FREE = frozenset(
    {"task_id", "producer", "result_cls", "task_type", "shadow", "headers", "ignore_result", "ordering_key", "queue"}
    | {"priority", "serializer", "time_limit", "soft_time_limit"}
)
"""What a plain call may say. Any other option is plain only where it is None, as most options of a task are."""

_encode = JSONEncoder().encode
"""What kombu's `dumps` makes anew for each message."""
_JSON = ("application/json", "utf-8", dumps)

_STAMPED = frozenset({"key", "deadline_ms"})
"""What `stamp_call` writes. A stamp that says more was made by somebody else."""

_NUMBERS = frozenset({int, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class PlainCall:
    """A message as Celery would build it, without taskguard's stamp."""

    headers: dict[str, Any]
    properties: dict[str, Any]
    body: tuple[Any, ...]
    queue: str
    payload: bytes
    """The body as JSON."""


class PlainCalls:
    """Of one application. They live as long as Celery's own sender of messages, which keeps the same settings."""

    def __init__(self, amqp: Any) -> None:
        app = amqp.app
        self._amqp = amqp
        self._app: Celery = app
        self._delivery_mode = app.conf.task_default_delivery_mode
        self._serializer = app.conf.task_serializer
        self._replaced = bool(app.conf.task_compression) or not (
            _is_stock(type(app), "send_task", celery_base)
            and _is_stock(type(amqp), "as_task_v2", celery_amqp)
            and _is_stock(type(amqp), "_create_task_sender", celery_amqp)
            and "as_task_v2" not in vars(amqp)
            and getattr(amqp.create_task_message, "__self__", None) is amqp
        )
        self._process: object = None
        self._headers: dict[str, Any] = {}

    def call(self, task: ReliableTask, args: Any, kwargs: Any, options: Mapping[str, Any]) -> PlainCall | None:
        """The message of a call of *task*; None where the call is not plain."""
        args, kwargs, given = args or (), kwargs or {}, options.get("headers") or {}
        if self._replaced or options.get("task_type") is not task or not _is_plain(options):
            return None
        if self._process is not forks.process:  # which the headers name as their origin
            # Not taskguard's own, which would give the template the delay of a message that is being sent.
            self._headers, self._process = celery_amqp.AMQP.as_task_v2(self._amqp, "", "").headers, forks.process
        if (
            not isinstance(args, (list, tuple))
            or type(kwargs) is not dict
            or not given.keys().isdisjoint(self._headers)
            or not (KEY not in given or _is_ours(given[KEY]))
        ):
            return None
        if (options.get("serializer") or self._serializer) != "json" or registry._encoders.get("json") != _JSON:
            return None
        queue = None if self._app.current_worker_task else self._queue(task, options)
        if type(queue) is not Queue or queue.exchange.type != "direct":
            return None
        shown = flat_repr(args, self._amqp.argsrepr_maxsize), flat_repr(kwargs, self._amqp.kwargsrepr_maxsize)
        if not all(shown):
            return None
        task_id = options.get("task_id") or _new_id()
        headers = {
            **self._headers,
            "task": task.name,
            "id": task_id,
            "shadow": options.get("shadow"),
            "timelimit": [options.get("time_limit"), options.get("soft_time_limit")],
            "root_id": task_id,
            "argsrepr": shown[0],
            "kwargsrepr": shown[1],
            "ignore_result": options.get("ignore_result"),
            "stamps": {},
            **given,
        }
        properties = {
            "correlation_id": task_id,
            "reply_to": self._app.thread_oid,
            "delivery_mode": queue.exchange.delivery_mode or self._delivery_mode,
        }
        if options.get("priority") is not None:
            properties["priority"] = options["priority"]
        body = (args, kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
        try:
            payload = _encode(body).encode()
        except Exception:  # noqa: BLE001 (arguments raise what they like; on Celery's way it is said which one)
            return None
        return PlainCall(headers, properties, body, queue.name, payload)

    def _queue(self, task: ReliableTask, options: Mapping[str, Any]) -> Any:
        """The queue of the call; None where only Celery's router can tell."""
        router, wanted = vars(self._amqp).get("router") or self._amqp.router, options.get("queue")
        if type(router) is not Router:
            return None
        if router.routes:
            if any(type(each) is not MapRoute for each in router.routes):
                return None
            route = router.lookup_route(task.name)
            if route and route.keys() != {"queue"}:
                return None
            wanted = wanted or (route and route["queue"])
        wanted = wanted or self._app.conf.task_default_queue
        try:
            return wanted if isinstance(wanted, Queue) else router.queues[wanted]
        except KeyError:
            return None


def _new_id() -> str:
    """A random UUID, as Celery's own, in a fifth of the time."""
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{'89ab'[int(text[16], 16) % 4]}{text[17:20]}-{text[20:]}"


def _is_plain(options: Mapping[str, Any]) -> bool:
    if _before.receivers or _after.receivers or _sent.receivers:
        return False
    return _FREE.issuperset([name for name, value in options.items() if value is not None])


def _is_ours(stamp: Any) -> bool:
    return isinstance(stamp, dict) and stamp.keys() <= _STAMPED and is_name(stamp.get("key", KEY))


def _is_stock(kind: type, name: str, module: ModuleType) -> bool:
    """Whether nobody but taskguard has put himself between the class and *module*'s own function."""
    found = [vars(each)[name] for each in kind.__mro__ if name in vars(each)]
    return all(
        type(each) is FunctionType
        and (each.__globals__ is vars(module) or each.__module__ == "taskguard.celery.publishing")
        for each in found
    )


def flat_repr(values: Sequence[Any] | dict[Any, Any], most: int) -> str:
    """Celery's ``saferepr`` of values that hold no others, in a tenth of its time; empty for any others."""
    kind = type(values)
    if kind is dict:
        keys, shown = [_flat(key) for key in values], [_flat(value) for value in values.values()]  # type: ignore[union-attr]
        if None in keys or None in shown:
            return ""
        text = "{" + ", ".join([f"{key}: {value}" for key, value in zip(keys, shown, strict=True)]) + "}"
    elif kind is tuple or kind is list:
        shown = [_flat(value) for value in values]
        if None in shown:
            return ""
        inside = ", ".join(shown)  # type: ignore[arg-type]
        text = f"[{inside}]" if kind is list else f"({inside},)" if len(shown) == 1 else f"({inside})"
    else:
        return ""
    return text if len(text) < most else ""


def _flat(value: Any) -> str | None:
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'" if type(value) is str else None
    return f"{value}" if type(value) in _NUMBERS else None
