"""From Celery's shapes to the envelope and back: kombu messages, task requests, bodies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.app.task import Context
from kombu.serialization import dumps, loads, prepare_accept_content

from taskguard import headers
from taskguard.celery.flaws import MOST_ATTEMPTS, is_name
from taskguard.clock import LATEST, instant, wall_clock
from taskguard.envelope import Envelope, record_id
from taskguard.errors import ConfigurationError

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask

CARRIED_PROPERTIES = ("correlation_id", "reply_to", "priority", "delivery_mode")


def envelope_of(
    *,
    task_id: str,
    name: str,
    task: ReliableTask | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    message_headers: Mapping[str, Any],
    body: bytes,
    content_type: str,
    content_encoding: str,
    properties: Mapping[str, Any],
    delivery: Mapping[str, Any],
) -> Envelope:
    """The envelope of a message, stamped by its producer or not. What the stamp lacks is made from the arguments."""
    stamp = _stamp_of(message_headers)
    key, fingerprint = _name(stamp.get("key")), _name(stamp.get("fp"))
    if not key:
        key = task.key_for(args, kwargs, task_id) if task is not None else task_id
    if not fingerprint:
        fingerprint = task.fingerprint_for(args, kwargs) if task is not None else ""
    routing_key = str(delivery.get("routing_key") or "")
    return Envelope(
        task=name,
        task_id=task_id,
        key=key,
        body=body,
        content_type=content_type,
        content_encoding=content_encoding,
        headers=message_headers,
        properties={name: properties[name] for name in CARRIED_PROPERTIES if properties.get(name) is not None},
        exchange=str(delivery.get("exchange") or ""),
        routing_key=routing_key,
        queue=str(delivery.get("queue") or routing_key),
        fingerprint=fingerprint,
        sequence=_sequence(stamp),
        deadline_at=deadline_of(message_headers),
    )


def _stamp_of(message_headers: Mapping[str, Any]) -> Mapping[str, Any]:
    stamp = message_headers.get(headers.KEY)
    return stamp if isinstance(stamp, Mapping) else {}


def _name(value: Any) -> str:
    return value if is_name(value) else ""


def _sequence(stamp: Mapping[str, Any]) -> int:
    sequence = stamp.get("seq", 0)
    # A bool is none: no store could read it back; nor could one hold a number without end.
    return sequence if type(sequence) is int and 0 <= sequence <= MOST_ATTEMPTS else 0


def deadline_of(message_headers: Mapping[str, Any]) -> float | None:
    """The message's deadline in epoch seconds: taskguard's, or Celery's ``expires``, whichever is earlier."""
    deadline_ms = _stamp_of(message_headers).get("deadline_ms")
    found: list[float] = []
    # NaN is no instant; what lies beyond the last one is no deadline.
    if isinstance(deadline_ms, (int, float)) and abs(deadline_ms) <= 1000 * LATEST:
        found.append(deadline_ms / 1000)
    expires = message_headers.get("expires")
    if expires is not None:
        # The consumer buries a message with a bad instant before it gets here.
        with suppress(ConfigurationError, OverflowError):
            found.append(instant(expires, now=wall_clock(), what="expires"))
    return min(found, default=None)


def received_envelope(message: Any, task: ReliableTask | None, converted: tuple[Any, Any] | None = None) -> Envelope:
    """The envelope of a message with a readable body, as the consumer hands it over.

    *converted*: headers and body that Celery made of a protocol 1 message; it rests, and is sent on, as protocol 2.
    """
    if converted is None:
        message_headers, payload = _headers_at_rest(message), message.payload
        body, content_type, content_encoding = message.body, message.content_type, message.content_encoding
    else:
        message_headers, payload = converted
        content_type, content_encoding, body = dumps(payload, serializer="json")
    args, kwargs, _ = payload
    return envelope_of(
        task_id=message_headers["id"],
        name=message_headers["task"],
        task=task,
        args=args,
        kwargs=kwargs,
        message_headers=message_headers,
        body=as_bytes(body),
        content_type=content_type,
        content_encoding=content_encoding,
        properties=message.properties or {},
        delivery=message.delivery_info or {},
    )


def _headers_at_rest(message: Any) -> dict[str, Any]:
    found = message.headers if isinstance(message.headers, Mapping) else {}
    kept = headers.redelivered_headers_dropped(found)
    if not message.errors:
        kept.pop("compression", None)  # kombu has decompressed the body, and leaves the header standing
    return kept


def raw_envelope(message: Any) -> Envelope:
    """The envelope of a message that cannot be read: whatever its headers say, and the bytes as they came.

    Without a producer's stamp the key stays empty: the worker that can read the message makes it from the arguments.
    """
    found = message.headers if isinstance(message.headers, Mapping) else {}
    body = as_bytes(message.body)
    stamp = _stamp_of(found)
    info = message.delivery_info or {}
    properties = message.properties or {}
    return Envelope(
        task=_name(found.get("task")),
        task_id=_name(found.get("id")) or record_id("raw", body.hex()),
        key=_name(stamp.get("key")),
        fingerprint=_name(stamp.get("fp")),
        sequence=_sequence(stamp),
        deadline_at=deadline_of(found),
        body=body,
        content_type=str(message.content_type or ""),
        content_encoding=str(message.content_encoding or ""),
        headers=_restable(_headers_at_rest(message)),
        properties=_restable({name: properties[name] for name in CARRIED_PROPERTIES if properties.get(name)}),
        exchange=_name(info.get("exchange")),
        routing_key=_name(info.get("routing_key")),
        queue=_name(info.get("routing_key")),
    )


def _restable(found: dict[str, Any]) -> dict[str, Any]:
    """*found* without what JSON cannot write: nested too deep, or keys that are no text."""
    kept = {}
    for name, value in found.items():
        try:
            json.dumps({name: value}, default=str)
        except (TypeError, ValueError, RecursionError) as exc:
            kept[str(name)] = f"<{type(value).__name__} that cannot be kept: {type(exc).__name__}>"
        else:
            kept[name] = value
    return kept


def eager_envelope(task: ReliableTask, request: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Envelope:
    """The envelope of a run that has no message: eager mode, and tasks called by the tracer alone."""
    stamp = dict((request.headers or {}).get(headers.KEY) or {})
    stamp.setdefault("seq", request.retries)
    embed = {name: getattr(request, name) for name in ("callbacks", "errbacks", "chain", "chord")}
    content_type, content_encoding, body = dumps((args, kwargs, embed), serializer=task.app.conf.task_serializer)
    return envelope_of(
        task_id=request.id,
        name=task.name,
        task=task,
        args=args,
        kwargs=kwargs,
        message_headers={"id": request.id, "task": task.name, "retries": request.retries, headers.KEY: stamp},
        body=as_bytes(body),
        content_type=content_type,
        content_encoding=content_encoding,
        properties={},
        delivery=request.delivery_info or {},
    )


def context_of(app: Celery, envelope: Envelope) -> Context:
    """The task context of a message at rest, for result backends: chord, errbacks, group."""
    embed: Mapping[str, Any] = {}
    args: Any = ()
    kwargs: Any = {}
    try:
        accept = prepare_accept_content(app.conf.accept_content)
        body = loads(envelope.body, envelope.content_type, envelope.content_encoding, accept=accept)
        args, kwargs, embed = body
    except Exception:  # noqa: BLE001 (an unreadable body has no chord and no errbacks to tell)
        embed = {}
    known = {**envelope.headers, **(embed or {})}
    return Context({**known, "args": args, "kwargs": kwargs, **envelope.properties})


def as_bytes(body: Any) -> bytes:
    """A message body as bytes, whatever the transport made of it."""
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        return body.encode("utf-8", "surrogatepass")
    return bytes(body) if isinstance(body, (bytearray, memoryview)) else repr(body).encode()


def encode_result(serializer: str, value: Any) -> bytes:
    """A result as it is stored for duplicates: its content type, a line feed, the payload."""
    return _no_result(serializer) if value is None else _encoded(value, serializer)


def _encoded(value: Any, serializer: str) -> bytes:
    content_type, _, payload = dumps(value, serializer=serializer)
    return str(content_type).encode() + b"\n" + as_bytes(payload)


@cache
def _no_result(serializer: str) -> bytes:
    """Most tasks return nothing, and a serializer takes as long for that as for anything small."""
    return _encoded(None, serializer)


def decode_result(app: Celery, stored: bytes) -> Any:
    """Read what `encode_result` wrote; only content types the application accepts."""
    content_type, _, payload = stored.partition(b"\n")
    accept = prepare_accept_content(app.conf.result_accept_content or app.conf.accept_content)
    binary = "binary" if content_type not in (b"application/json", b"application/x-yaml") else "utf-8"
    return loads(payload, content_type.decode(), binary, accept=accept)
