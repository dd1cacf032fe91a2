"""What is wrong with a message, told before Celery unpacks it.

Celery takes headers and bodies as they come: one of the wrong type raises in the worker's parent process and ends it,
or raises in a callback of the pool and keeps a prefetch slot for ever. What is refused here becomes a dead letter, so
only what no producer sends may be refused: headers that Celery does not read are let through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from celery.utils.time import maybe_iso8601

from taskguard.clock import LATEST, instant
from taskguard.errors import ConfigurationError

LONGEST_NAME = 1000
"""Characters of an id or a name; Celery's have 36, and databases keep 64 KiB of UTF-8 at least."""
MOST_ATTEMPTS = 2**30
"""Nobody counts so far, and stores hold it with room for what is added."""
EARLIEST = -62_135_500_000.0
"""Epoch seconds. Python's calendar begins a day before: at its very ends, a change of the zone overflows."""
A_DAY = 86400.0
DEEPEST = 50
"""Levels of nesting in a header: what JSON reads in one place it may not be able to write in a deeper one."""

_BODY = frozenset({"args", "kwargs", "callbacks", "errbacks", "chain", "chord"})
"""Fields of a protocol 1 body that are no headers."""
_NAMES = ("shadow", "root_id", "parent_id", "group", "reply_to", "correlation_id")
_Nested = list[Any] | tuple[Any, ...] | dict[Any, Any]


def is_name(value: object) -> bool:
    """Whether *value* can be an id or a name wherever one is kept: text that is not empty, too long or half a pair."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
        return False
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def flaw_of(message: Any) -> str | None:
    """What is wrong with a message whose headers name a task; None if nothing. Raises what decoding raises."""
    flaw = headers_flaw(message.headers)
    if flaw is None:
        flaw = shape_flaw(message.payload, message.headers)
    return flaw


def shape_flaw(body: Any, headers: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with the shape of a body; a mapping is protocol 1, or a hybrid, which Celery converts."""
    match body:
        case [list() | tuple(), dict(), dict() | None as embed]:
            return _embed_flaw(embed or {})
        case {"args": args} if isinstance(args, (list, tuple)) and isinstance(body.get("kwargs", {}), Mapping):
            return headers_flaw({**body, **(headers or {})}) or _embed_flaw(body)
        case {"task": str(), "id": str()} if "args" not in body and isinstance(body.get("kwargs", {}), Mapping):
            return headers_flaw(body) or _embed_flaw(body)
    return f"the body is not [args, kwargs, options] but {type(body).__name__}: {_short(body)}"


def headers_flaw(headers: Mapping[str, Any]) -> str | None:
    """What is wrong with a message's headers, or with the fields of a protocol 1 body, which become headers."""
    if not is_name(headers.get("id")):
        return f"header id {_short(headers.get('id'))} is not a task id"
    if not is_name(headers.get("task")):
        return f"header task {_short(headers.get('task'))} is not a task name"
    for name in _NAMES:
        value = headers.get(name)
        if value is not None and value != "" and not is_name(value):
            return f"header {name} {_short(value)} is not a name"
    for name in ("eta", "expires"):
        if headers.get(name) is not None and not _is_instant(headers[name]):
            return f"header {name} {_short(headers[name])} is not an instant"
    limits = headers.get("timelimit")
    if limits is not None and limits != [None, None] and not _are_limits(limits):
        return f"header timelimit {_short(limits)} is not a pair of seconds"
    retries = headers.get("retries")
    if retries is not None and not (type(retries) is int and 0 <= retries <= MOST_ATTEMPTS):
        return f"header retries {_short(retries)} is not a count"
    for name, value in headers.items():
        if isinstance(value, (list, dict)) and name not in _BODY and _deeper_than(value, DEEPEST):
            return f"header {name!r} is nested more than {DEEPEST} deep"
    return _stamps_flaw(headers)


def _deeper_than(value: _Nested, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        inside = (each.values() if isinstance(each, dict) else each for each in layer)
        layer = [inner for inners in inside for inner in inners if isinstance(inner, (list, tuple, dict))]
        if not layer:
            return False
    return True


def _stamps_flaw(headers: Mapping[str, Any]) -> str | None:
    names, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        return f"header stamped_headers {_short(names)} is not a list of names"
    if stamps is not None and not isinstance(stamps, Mapping):
        return f"header stamps {_short(stamps)} is not a mapping"
    return None


def _embed_flaw(embed: Mapping[str, Any]) -> str | None:
    """What is wrong with the canvas of a message: what is sent when the task has ended must be signatures."""
    for name in ("callbacks", "errbacks", "chain"):
        steps = embed.get(name)
        if steps is not None and not (isinstance(steps, (list, tuple)) and all(map(_is_signature, steps))):
            return f"{name} {_short(steps)} is not a list of signatures"
    if not all(isinstance(step.get("options"), Mapping) for step in embed.get("chain") or ()):
        return f"chain {_short(embed['chain'])} has a step without options"  # which Celery reads when the task fails
    if embed.get("chord") is not None and not _is_signature(embed["chord"]):
        return f"chord {_short(embed['chord'])} is not a signature"
    return None


def _is_signature(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and is_name(value.get("task"))
        and isinstance(value.get("args") or (), (list, tuple))
        and isinstance(value.get("kwargs") or {}, Mapping)
        and isinstance(value.get("options") or {}, Mapping)
    )


def _is_instant(value: object) -> bool:
    try:
        at = instant(maybe_iso8601(value), now=0.0)
    except (ConfigurationError, ValueError, TypeError, AttributeError, OverflowError):
        return False
    return EARLIEST <= at <= LATEST - A_DAY


def _are_limits(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (0, 2)
        and all(
            limit is None or (type(limit) in (int, float) and math.isfinite(limit) and 0 <= limit < 1e9)
            for limit in value
        )
    )


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception as exc:  # noqa: BLE001 (an integer of too many digits, or whatever a serializer made)
        text = f"<{type(value).__name__} that cannot be shown: {type(exc).__name__}>"
    return text if len(text) <= 80 else f"{text[:80]}…"
