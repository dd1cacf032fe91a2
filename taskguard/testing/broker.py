"""The broker of a rehearsal: one list of messages in this process, behind kombu's own in-memory transport.

Everything that Celery publishes goes through kombu to here (tasks, retries, what the relay sends), so routing and
serialisation are the real ones. Nothing is shared with another rehearsal.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from queue import Empty
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu.connection import Connection
from kombu.serialization import loads, prepare_accept_content
from kombu.transport import memory, virtual

from taskguard.envelope import Envelope
from taskguard.testing.process import Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message as its sender meant it. ``due_at``: epoch seconds, for one that rests in the store; None in a queue."""

    task: str
    task_id: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    queue: str
    due_at: float | None = None


@dataclass(slots=True)
class Parcel:
    """A message in a queue, as kombu's virtual transports carry it."""

    queue: str
    raw: dict[str, Any]
    redelivered: bool = False

    @property
    def headers(self) -> dict[str, Any]:
        """The message's headers."""
        found: dict[str, Any] = self.raw.get("headers") or {}
        return found

    def again(self) -> Parcel:
        """Another copy, as a broker or a publisher makes one."""
        raw = deepcopy(self.raw)
        raw["properties"]["delivery_tag"] = uuid4().hex
        return Parcel(self.queue, raw, self.redelivered)


@dataclass(slots=True)
class Broker:
    """Keeps every message until it is acknowledged. ``sent``: all that were ever published, run or not."""

    process: Process
    waiting: list[Parcel] = field(default_factory=list)
    sent: list[Parcel] = field(default_factory=list)
    _out: dict[str, Parcel] = field(default_factory=dict)
    _transport: Any = field(init=False)
    _connection: Any = field(init=False)

    def __post_init__(self) -> None:
        channel = type("Channel", (_Channel,), {"broker": self, "queues": {}})
        state = virtual.BrokerState()
        self._transport = type("Transport", (memory.Transport,), {"Channel": channel, "global_state": state})
        self._connection = self.connect()

    def connect(self) -> Any:
        """A new connection to this broker."""
        return Connection(transport=self._transport)

    def put(self, queue: str, raw: dict[str, Any]) -> None:
        """A message has come."""
        parcel = Parcel(queue, raw)
        if "task" in parcel.headers:
            self.sent.append(parcel)
            self.waiting.append(parcel)

    def take(self, app: Celery) -> Any:
        """The longest waiting message, unacknowledged; None when there is none."""
        if not self.waiting:
            return None
        parcel = self.waiting.pop(0)
        raw = deepcopy(parcel.raw)
        raw["properties"]["delivery_info"]["redelivered"] = parcel.redelivered
        channel = self._connection.default_channel
        message = channel.Message(raw, channel=channel, accept=prepare_accept_content(app.conf.accept_content))
        self._out[message.delivery_tag] = parcel
        return message

    def settle(self, tag: str, *, requeue: bool = False) -> None:
        """A message is acknowledged, or rejected."""
        self.process.reach("acknowledge", "the message is acknowledged")
        parcel = self._out.pop(tag)
        if requeue:
            self.waiting.append(Parcel(parcel.queue, parcel.raw, redelivered=True))

    def lose_worker(self) -> None:
        """The worker is gone: what it had not acknowledged comes again."""
        self.waiting[:0] = [Parcel(parcel.queue, parcel.raw, redelivered=True) for parcel in self._out.values()]
        self._out.clear()

    def message(self, app: Celery, parcel: Parcel) -> Message:
        """What a parcel holds."""
        channel = self._connection.default_channel
        read = channel.Message(parcel.raw, channel=channel)
        envelope = Envelope(
            task=parcel.headers["task"],
            task_id=parcel.headers["id"],
            key="",
            body=read.body,
            content_type=read.content_type,
            content_encoding=read.content_encoding,
        )
        return opened(app, envelope, queue=parcel.queue)

    def close(self) -> None:
        """Forget everything."""
        self._connection.release()
        self.waiting.clear()


def opened(app: Celery, envelope: Envelope, *, queue: str, due_at: float | None = None) -> Message:
    """A message whose body is read. What cannot be read has no arguments."""
    try:
        accept = prepare_accept_content(app.conf.accept_content)
        args, kwargs, _ = loads(envelope.body, envelope.content_type, envelope.content_encoding, accept=accept)
    except Exception:  # noqa: BLE001 (serialisers raise what they like, and the worker is the one to judge)
        args, kwargs = (), {}
    return Message(task=envelope.task, task_id=envelope.task_id, args=args, kwargs=kwargs, queue=queue, due_at=due_at)


class _Channel(memory.Channel):
    broker: Broker

    def basic_publish(self, message: Any, exchange: str, routing_key: str, **options: Any) -> Any:
        name = (message.get("headers") or {}).get("task")
        if name:
            self.broker.process.reach("publish", f"{name} is sent")
        return super().basic_publish(message, exchange, routing_key, **options)  # type: ignore[no-untyped-call]

    def _lookup(self, exchange: str, routing_key: str, default: Any = None) -> Any:
        # No worker has bound the queues of an exchange of the user's own; a test still wants to see the message.
        bound = super()._lookup(exchange, routing_key, default)  # type: ignore[no-untyped-call]
        return bound or [routing_key or exchange]

    def _put(self, queue: str, message: Any, **_: Any) -> None:
        self.broker.put(queue, message)

    def _put_fanout(self, exchange: str, message: Any, routing_key: str | None = None, **_: Any) -> None:
        for queue in self._lookup(exchange, routing_key or ""):
            self.broker.put(queue, message)

    def _get(self, queue: str, timeout: Any = None) -> Any:
        raise Empty

    def _size(self, queue: str) -> int:
        return sum(parcel.queue == queue for parcel in self.broker.waiting)

    def _purge(self, queue: str) -> int:
        size = self._size(queue)
        self.broker.waiting[:] = [parcel for parcel in self.broker.waiting if parcel.queue != queue]
        return size

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        self.broker.settle(delivery_tag)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self.broker.settle(delivery_tag, requeue=requeue)
