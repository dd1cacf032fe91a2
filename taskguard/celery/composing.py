"""Composing: what a call would send, as messages at rest, with nothing sent, told or connected."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from celery import Celery
from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from taskguard.celery.effects import attach, recorded, saves_chords_apart
from taskguard.celery.publishing import CapturingProducer, capturing
from taskguard.celery.runtime import runtime_of
from taskguard.clock import to_ms, wall_clock
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, UnserialisableArgument
from taskguard.headers import PREPARE

T = TypeVar("T")

REDIS = frozenset({"redis", "rediss", "sentinel", "redis+socket", "valkey", "valkeys"})
_tags = Random()
os.register_at_fork(after_in_child=_tags.seed)
_on_redis: WeakKeyDictionary[Celery, bool] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Composed:
    """A message as it will rest. ``due_at_ms`` None: at once. ``ordering``: its ordering key or ""."""

    envelope: Envelope
    wire: bytes
    due_at_ms: int | None
    ordering: str


def compose(app: Celery, send: Callable[[Any], T]) -> tuple[T, list[Composed]]:
    """Do *send*, which is given the producer to send with. Returns its result and what it would have published.

    Raises UnserialisableArgument, which names the argument, and whatever Celery says of a call that cannot be.
    """
    refusal = runtime_of(app).refusal
    if refusal is not None:
        raise refusal
    with recorded(app) as effects, capturing() as capture:
        result = send(CapturingProducer())
    envelopes: Sequence[Envelope] = capture.envelopes
    if effects:
        envelopes = attach(effects, envelopes, to_all=not saves_chords_apart(app))
    given = zip(envelopes, capture.dues, capture.orderings, strict=True)
    return result, [composed(app, *each) for each in given]


def composed(app: Celery, envelope: Envelope, due_at: float | None, ordering: str) -> Composed:
    """One message, as it will rest."""
    _check_unique(app, envelope)
    ready = _is_on_redis(app) and not envelope.exchange and PREPARE not in envelope.properties
    wire = envelope.to_ready(f"{_tags.getrandbits(128):032x}") if ready else envelope.to_wire()
    due = to_ms(due_at) if due_at is not None and due_at > wall_clock() else None
    return Composed(envelope, wire, due, ordering)


def _is_on_redis(app: Celery) -> bool:
    """Whether messages are queue items that kombu's Redis transport makes. A wrong guess costs the relay time only."""
    known = _on_redis.get(app)
    if known is None:
        known = _on_redis[app] = (app.conf.broker_write_url or "").partition("://")[0] in REDIS
    return known


def _check_unique(app: Celery, envelope: Envelope) -> None:
    task = app.tasks.get(envelope.task)
    if getattr(task, "unique_for", None) is not None:
        raise ConfigurationError(
            f"{envelope.task}: unique_for holds a name in the store, which a transaction that is rolled back would not "
            "give back; send it without a session, or leave unique_for out and give it an idempotency_key"
        )


def culprit(task: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], exc: Exception) -> Exception:
    """The error that names the argument which cannot be serialised."""
    serializer = getattr(task, "serializer", None)
    names = _names(task)
    for number, value in enumerate(args):
        if not _can_be_sent(value, serializer):
            return _error(name, names[number] if number < len(names) else f"number {number + 1}", value, serializer)
    for key, value in kwargs.items():
        if not _can_be_sent(value, serializer):
            return _error(name, key, value, serializer)
    return UnserialisableArgument(f"{name}: its arguments cannot be sent ({exc}); send what JSON can write")


def _error(name: str, argument: str, value: Any, serializer: str | None) -> UnserialisableArgument:
    return UnserialisableArgument(
        f"{name}: the argument {argument} is a {type(value).__module__}.{type(value).__qualname__}, which "
        f"{serializer or 'json'} cannot write; send what names it, such as its id"
    )


def _can_be_sent(value: Any, serializer: str | None) -> bool:
    try:
        dumps([value], serializer=serializer)
    except EncodeError:
        return False
    return True


def _names(task: Any) -> list[str]:
    from taskguard.celery.task import ReliableTask, _caller_signature

    signature = _caller_signature(type(task)) if isinstance(task, ReliableTask) else None
    return [] if signature is None else list(signature.parameters)
