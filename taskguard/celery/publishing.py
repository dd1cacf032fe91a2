"""Publishing: where every message leaves, whoever sends it.

`Task.apply_async` is passed by ``send_task``, ``map`` and ``chunks``, so the stamping, the resting of delayed messages
and the enqueue-time uniqueness stand where Celery hands a built message to the broker. There the exchange, the queue
and the body are known, so a message that rests is kept exactly as it would have been sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery import Celery
from kombu import compression as compressors
from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from taskguard import headers
from taskguard.celery.eviction import check_broker
from taskguard.celery.links import with_task_ids
from taskguard.celery.message import as_bytes, deadline_of, envelope_of
from taskguard.celery.plain import PlainCalls
from taskguard.celery.runtime import Runtime, runtime_of
from taskguard.clock import Duration, instant, to_ms, wall_clock
from taskguard.custody import Leased, Unique
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, DuplicateTask, StoreError
from taskguard.events import Event
from taskguard.idempotency import check_key

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask

PRODUCER_GRACE = 5.0
"""Seconds after which a relay sends a unique message that its producer reserved and did not get to publish."""

inherited_deadline: ContextVar[float | None] = ContextVar("taskguard_deadline", default=None)
"""The deadline of the run that is publishing: what is started inside it is not worth more time."""


@dataclass(slots=True)
class Capture:
    """What was about to be sent, while a `capturing` block is open, and what a unique message collided with.

    To each envelope, when it is due (None: at once), and its ordering key ("": none).
    """

    envelopes: list[Envelope] = field(default_factory=list)
    dues: list[float | None] = field(default_factory=list)
    orderings: list[str] = field(default_factory=list)

    def add(self, envelope: Envelope, due_at: float | None, ordering: str) -> None:
        """This was about to be sent."""
        self.envelopes.append(envelope)
        self.dues.append(due_at)
        self.orderings.append(ordering)


_delay: ContextVar[tuple[Celery | None, Any, Any]] = ContextVar("taskguard_delay", default=(None, None, None))
"""The countdown and the eta of the message that this application is sending, which its ``send_task`` is not shown."""

_capture: ContextVar[Capture | None] = ContextVar("taskguard_capture", default=None)
queued_instead: ContextVar[str | None] = ContextVar("taskguard_queued_instead", default=None)


class capturing:
    """Collect messages as envelopes instead of sending them."""

    __slots__ = ("_into", "_token")

    def __init__(self, into: Capture | None = None) -> None:
        self._into = Capture() if into is None else into

    def __enter__(self) -> Capture:
        self._token = _capture.set(self._into)
        return self._into

    def __exit__(self, *_: object) -> None:
        _capture.reset(self._token)


def delaying(app: Celery) -> Callable[..., Any]:
    """The application's ``send_task``, which leaves delays to the store.

    Shown a delay and a quorum queue, Celery's own routes the message through the broker's delaying exchanges. At rest
    it would keep that route, and be delayed a second time when it is due.
    """
    send_task = app.send_task
    is_celerys = getattr(send_task, "__self__", None) is app

    def send(
        name: str,
        args: Any = None,
        kwargs: Any = None,
        countdown: Any = None,
        eta: Any = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        capture = _capture.get()
        if (
            type(options.get("producer")) is CapturingProducer
            and capture is not None
            and is_celerys
            and not (countdown or eta or more)
        ):
            # Cached properties, with slow getters; the first message, which makes them, goes Celery's way.
            sender = vars(vars(app).get("amqp", app)).get("send_task_message")
            result = sender.plainly(capture, name, args, kwargs, options) if type(sender) is Sender else None
            if result is not None:
                return result
        ours = runtime_of(app).settings.store is not None or capture is not None
        token = _delay.set((app, countdown, eta) if ours else (None, None, None))
        shown = (None, None) if ours else (countdown, eta)
        try:
            return send_task(name, args, kwargs, *shown, *more, **options)
        finally:
            _delay.reset(token)

    return send


@contextmanager
def sending() -> Iterator[None]:
    """What is sent in this block is sent, whatever collects messages around it."""
    token = _capture.set(None)
    try:
        yield
    finally:
        _capture.reset(token)


class CapturingProducer:
    """Stands in for a kombu producer: serialises as it would, and keeps the outcome."""

    class connection:
        @staticmethod
        def _reraise_as_library_errors() -> Any:
            return nullcontext()

    def __init__(self) -> None:
        self.published: dict[str, Any] = {}

    def publish(
        self, body: Any, *, serializer: str | None = None, compression: str | None = None, **options: Any
    ) -> None:
        content_type, content_encoding, payload = dumps(body, serializer=serializer)
        payload = as_bytes(payload)
        message_headers = dict(options.pop("headers", None) or {})
        if compression:
            payload, message_headers["compression"] = compressors.compress(payload, compression)
        self.published = {
            **options,
            "body": payload,
            "headers": message_headers,
            "content_type": content_type,
            "content_encoding": content_encoding,
        }


class PublishingMixin:
    """Put in front of the application's AMQP class by `taskguard.install`."""

    app: Celery

    def as_task_v2(
        self, task_id: str, name: str, args: Any = None, kwargs: Any = None, countdown: Any = None, eta: Any = None,
        *more: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """Celery's message, with the delay that `delaying` kept from ``send_task``."""
        app, kept_countdown, kept_eta = _delay.get()
        if app is self.app:
            _delay.set((None, None, None))  # one message's, and not of those that its signals send
            countdown = kept_countdown if countdown is None else countdown
            eta = kept_eta if eta is None else eta
        return super().as_task_v2(task_id, name, args, kwargs, countdown, eta, *more, **options)  # type: ignore[misc]

    def _create_task_sender(self) -> Any:
        return Sender(self.app, super()._create_task_sender(), PlainCalls(self))  # type: ignore[misc]


class Sender:
    """Celery's ``send_task_message``, with taskguard's stamp, rest and uniqueness."""

    def __init__(self, app: Celery, send: Any, plain: PlainCalls) -> None:
        self._app = app
        self._send = send
        self._plain = plain

    def __call__(self, producer: Any, name: str, message: Any, **options: Any) -> Any:
        runtime = runtime_of(self._app)
        if runtime.refusal is not None:
            raise runtime.refusal
        task = _reliable(self._app, name)
        own_headers, properties, body, sent_event = message
        own_headers.update(options.pop("headers", None) or {})
        # ``send_task`` passes options it does not know down to here; `ReliableTask.apply_async` has stamped its own.
        own_headers.update(
            stamp_call(own_headers, name, options.pop("deadline", None), options.pop("idempotency_key", None))
        )
        ordering = options.pop("ordering_key", None)  # of the outbox alone; a later step of a canvas may bring it along
        due_at = instant(own_headers["eta"], now=wall_clock(), what="eta") if own_headers.get("eta") else None
        if task is not None:
            _stamp(task, own_headers, body)
            options.pop("expiration", None)
            body = (body[0], body[1], with_task_ids(self._app, body[2]))
        message = type(message)(own_headers, properties, body, sent_event)
        capture = _capture.get()
        if capture is not None:
            try:
                sent = self._built(name, message, options)
            except EncodeError as exc:
                from taskguard.celery.composing import culprit

                raise culprit(task or self._app.tasks.get(name), name, body[0], body[1], exc) from exc
            capture.add(self._envelope(task, name, message, sent), due_at, "" if ordering is None else str(ordering))
            return None
        unique = task is not None and task.unique_for is not None and _may_be_dropped(own_headers, body[2])
        later = due_at is not None and due_at > wall_clock()
        if runtime.settings.store is None and (unique or (later and task is not None)):
            raise ConfigurationError(
                f"{name}: a {'unique' if unique else 'delayed'} message rests in the store and none is configured; "
                "set TASKGUARD_STORE, taskguard_store or taskguard.install(app, store=...)"
            )
        if due_at is not None and later and runtime.settings.store is not None:
            envelope = self._envelope(task, name, message, self._built(name, message, options))
            return self._rest(runtime, envelope, due_at, task)
        runtime.broker_checked = runtime.broker_checked or check_broker(producer)
        if task is not None and unique:
            return self._send_unique(runtime, task, producer, name, message, options)
        return self._send(producer, name, message, **options)

    def plainly(self, capture: Capture, name: str, args: Any, kwargs: Any, options: Mapping[str, Any]) -> Any:
        """Collect the message of a plain call as ``send_task`` would send it. Returns its result; None: not plain."""
        task = _reliable(self._app, name)
        call = self._plain.call(task, args, kwargs, options) if task is not None else None
        if task is None or call is None:
            return None
        _stamp(task, call.headers, call.body)
        stamp = call.headers[headers.KEY]
        envelope = Envelope(
            task=name,
            task_id=call.headers["id"],
            key=stamp["key"],
            body=call.payload,
            headers=call.headers,
            properties=call.properties,
            routing_key=call.queue,
            queue=call.queue,
            fingerprint=stamp["fp"],
            deadline_at=deadline_of(call.headers),
        )
        ordering = options.get("ordering_key")
        capture.add(envelope, None, "" if ordering is None else str(ordering))
        ignored = call.headers["ignore_result"]
        if not ignored:
            self._app.backend.on_task_call(options["producer"], envelope.task_id)
        result = (options.get("result_cls") or self._app.AsyncResult)(envelope.task_id)
        result.ignored = ignored
        return result

    def _built(self, name: str, message: Any, options: dict[str, Any]) -> dict[str, Any]:
        """What Celery would hand to the producer, serialised: the arguments of a kombu publish."""
        own_headers, properties, body, _ = message
        message = type(message)({**own_headers, "eta": None}, properties, body, None)
        producer = CapturingProducer()
        # Without ``retry`` Celery leaves the connection alone, which a stand-in has none of.
        self._send(producer, name, message, **{**options, "retry": False})
        return producer.published

    def _envelope(self, task: ReliableTask | None, name: str, message: Any, sent: dict[str, Any]) -> Envelope:
        args, kwargs, _ = message[2]
        declared = sent.get("declare") or []
        return envelope_of(
            task_id=message[0]["id"],
            name=name,
            task=task,
            args=args,
            kwargs=kwargs,
            message_headers=sent["headers"],
            body=sent["body"],
            content_type=sent["content_type"],
            content_encoding=sent["content_encoding"],
            properties=sent,
            delivery={
                "exchange": getattr(sent["exchange"], "name", sent["exchange"]),
                "routing_key": sent["routing_key"],
                "queue": declared[0].name if declared else None,
            },
        )

    def _rest(self, runtime: Runtime, envelope: Envelope, due_at: float, task: ReliableTask | None) -> None:
        unique = _unique(task, envelope)
        holder = runtime.store.schedule(envelope, due_at=due_at, unique=unique)
        if task is not None and unique is not None and holder != envelope.task_id:
            _collide(task, envelope, holder)

    def _send_unique(
        self, runtime: Runtime, task: ReliableTask, producer: Any, name: str, message: Any, options: dict[str, Any]
    ) -> Any:
        """Reserve the name and rest the message in one step, publish, then remove it from rest.

        A producer that dies before it has published leaves the message due: a relay sends it after the grace.
        """
        sent = self._built(name, message, options)
        envelope = self._envelope(task, name, message, sent)
        lease = uuid.uuid4().hex
        store = runtime.store
        due_at = wall_clock() + PRODUCER_GRACE
        holder = store.schedule(envelope, due_at=due_at, lease=lease, unique=_unique(task, envelope))
        if holder != envelope.task_id:
            return _collide(task, envelope, holder)
        retry = self._app.conf.task_publish_retry if options.get("retry") is None else options["retry"]
        producer.publish(sent.pop("body"), **{**sent, "retry": retry})
        try:
            store.remove([Leased(envelope.copy_id, lease, b"")])
        except StoreError as exc:
            # It is sent. The relay sends it once more after the grace, and the claim knows it.
            runtime.observers(Event(name="store_unavailable", task=name, task_id=envelope.task_id, detail=str(exc)))
        return None


def stamp_call(
    given: Mapping[str, Any], task: str, deadline: Duration | datetime | None, idempotency_key: str | None
) -> dict[str, Any]:
    """The headers that carry what a call declares for itself. Empty where it declares nothing."""
    stamp = dict(given.get(headers.KEY) or {})
    if deadline is not None:
        stamp["deadline_ms"] = to_ms(instant(deadline, now=wall_clock()))
    if idempotency_key is not None:
        stamp["key"] = check_key(idempotency_key, task=task)
    return {headers.KEY: stamp} if stamp else {}


def _reliable(app: Celery, name: str) -> ReliableTask | None:
    from taskguard.celery.task import ReliableTask

    task = app.tasks.get(name)
    return task if isinstance(task, ReliableTask) else None


def _stamp(task: ReliableTask, own_headers: dict[str, Any], body: Any) -> None:
    """Write taskguard's header: key, fingerprint, sequence, deadline. What is there already stays."""
    args, kwargs, _ = body
    stamp = {
        # Retries that a task asks for, and children given its headers, did not book.
        name: value
        for name, value in dict(own_headers.get(headers.KEY) or {}).items()
        if name not in (headers.BOOKED, headers.SPARED)
    }
    if "key" not in stamp:
        stamp["key"] = task.key_for(args, kwargs, own_headers["id"])
    stamp["fp"] = task.fingerprint_for(args, kwargs)
    stamp.setdefault("seq", 0)
    own_headers[headers.KEY] = stamp
    stamp_deadline(task, own_headers)


def stamp_deadline(task: ReliableTask, own_headers: dict[str, Any]) -> None:
    """Write the earliest of the deadlines there are: the call's or else the task's, ``expires``, the sending run's."""
    stamp = dict(own_headers.get(headers.KEY) or {})
    if "deadline_ms" not in stamp and task.deadline is not None:
        stamp["deadline_ms"] = to_ms(instant(task.deadline, now=wall_clock()))
    own_headers[headers.KEY] = stamp
    known = [at for at in (deadline_of(own_headers), inherited_deadline.get()) if at is not None]
    if known:
        stamp["deadline_ms"] = to_ms(min(known))
    own_headers["expires"] = None


def _may_be_dropped(own_headers: dict[str, Any], embed: dict[str, Any]) -> bool:
    """Only a first, free-standing message may give way to one already queued: others carry a workflow on."""
    carries = any(embed.get(part) for part in ("callbacks", "errbacks", "chain", "chord"))
    first = own_headers.get("retries", 0) == 0 and own_headers[headers.KEY].get("seq", 0) == 0
    return first and not carries and own_headers.get("group") is None


def _unique(task: ReliableTask | None, envelope: Envelope) -> Unique | None:
    if task is None or task.unique_for is None or envelope.sequence:
        return None
    return Unique(envelope.id, task.unique_seconds)


def _collide(task: ReliableTask, envelope: Envelope, holder: str) -> None:
    if task.on_queued == "raise":
        raise DuplicateTask(
            f"{task.name} with key {envelope.key!r} is queued already as task {holder}; wait for it, or revoke it"
        )
    queued_instead.set(holder)
