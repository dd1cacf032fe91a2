"""What sending a group or a chord does to the result backend, kept until it is really sent.

Celery tells the backend the size of a chord, and of nested ones their structure, while it sends. In a transaction that
would be done whether it commits or not, and would hang a producer on a backend that is away. So in an outbox's send the
backend is told nothing; what it would have been told travels with the first message of the chord, and the relay tells
it just before it publishes that one. No chord can be complete before. Told twice, after a crash, it is the same.

The other side effect of a send, listening for the result before there is one, is put off until somebody waits for it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any
from weakref import WeakSet

from celery import Celery
from celery.result import result_from_tuple

from taskguard.envelope import Envelope
from taskguard.headers import PREPARE

RECORDED = ("set_chord_size", "save_group", "_set_chord_key", "expire")
SILENT = ("on_task_call", "add_pending_result")

Effect = list[Any]
"""The name of a backend's method and its arguments, as JSON."""

_unheard: WeakSet[Any] = WeakSet()
"""Members of groups that nobody listens for yet."""

_recording: ContextVar[list[Effect] | None] = ContextVar("taskguard_effects", default=None)


class recorded:
    """What is to be told to the backend of *app* in this block is kept instead."""

    __slots__ = ("_effects", "_token")

    def __init__(self, app: Celery) -> None:
        _instrument(app.backend)
        self._effects: list[Effect] = []

    def __enter__(self) -> list[Effect]:
        self._token = _recording.set(self._effects)
        return self._effects

    def __exit__(self, *_: object) -> None:
        _recording.reset(self._token)


def attach(effects: Sequence[Effect], envelopes: Sequence[Envelope], *, to_all: bool) -> list[Envelope]:
    """The messages, those carrying the effects that must come before them: the first of each group, or *to_all*."""
    carried: dict[int, list[Effect]] = {}
    for effect in effects:
        subject = _text(effect[1])
        members = [n for n, each in enumerate(envelopes) if (each.headers.get("group") or "\0") in subject] or [0]
        for number in members if to_all else members[:1]:
            carried.setdefault(number, []).append(effect)
    return [
        each.replace(properties={**each.properties, PREPARE: carried[number]}) if number in carried else each
        for number, each in enumerate(envelopes)
    ]


def concerns(effect: Effect, envelope: Envelope) -> bool:
    """Whether the effect is one of the group that the message belongs to."""
    return (envelope.headers.get("group") or "\0") in _text(effect[1])


def carrying(envelope: Envelope, effects: Sequence[Effect]) -> Envelope:
    """The message with what the backend is told before it is published."""
    return envelope.replace(properties={**envelope.properties, PREPARE: list(effects)}) if effects else envelope


def tell(app: Celery, effects: Sequence[Effect]) -> None:
    """Tell the backend now, and once: who tells it has a store's rows in hand. Raises what it raises."""
    backend: Any = app.backend
    policy = getattr(backend, "retry_policy", None)
    if policy is not None:
        backend.retry_policy = {**policy, "max_retries": 0}
    try:
        for name, *arguments in effects:
            getattr(backend, name)(*(_decoded(each, app) for each in arguments))
    finally:
        if policy is not None:
            backend.retry_policy = policy


def saves_chords_apart(app: Celery) -> bool:
    """Whether the backend needs a chord's structure only when its last task ends, as Redis does."""
    return hasattr(app.backend, "_chord_zset")


def _instrument(backend: Any) -> None:
    if getattr(backend, "_taskguard_records", False):
        return
    for name in (*RECORDED, *SILENT):
        method = getattr(backend, name, None)
        if method is not None:
            setattr(backend, name, _recorder(name, method))
    if hasattr(backend, "iter_native"):
        backend.iter_native = _listening_first(backend, backend.iter_native)
    backend._taskguard_records = True


def _listening_first(backend: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """Celery takes the members of a group that somebody waits for to be listened for since they were sent."""

    @wraps(method)
    def iter_native(result: Any, *args: Any, **kwargs: Any) -> Any:
        for node in _leaves(result):
            if node in _unheard:
                _unheard.discard(node)
                backend.add_pending_result(node, weak=True)
        return method(result, *args, **kwargs)

    return iter_native


def _leaves(result: Any) -> Iterator[Any]:
    for node in getattr(result, "results", None) or ():
        if getattr(node, "results", None) is None:
            yield node
        else:
            yield from _leaves(node)


def _recorder(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        effects = _recording.get()
        if effects is None:
            return method(*args, **kwargs)
        if name == "add_pending_result":
            _unheard.add(args[0])
        elif name in RECORDED:
            effects.append([name, *(_encoded(each) for each in (*args, *kwargs.values()))])
        return None

    return call


def _encoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if hasattr(value, "as_tuple"):
        return {"result": value.as_tuple()}
    return {"value": value}


def _decoded(value: dict[str, Any], app: Celery) -> Any:
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    if "result" in value:
        return result_from_tuple(value["result"], app)
    return value["value"]


def _text(value: dict[str, Any]) -> str:
    plain = _decoded(value, None) if "result" not in value else ""
    return plain.decode("utf-8", "replace") if isinstance(plain, bytes) else str(plain)
