"""The fingerprint of a payload: equal for the same call, however it is spelled and on either side of the broker.

The canonical form is the JSON that Celery's serializer would send, with sorted keys, so that what a message looks like
before it is sent and after it is read gives the same bytes: tuples are lists, the keys of a dict are strings, and
datetime, date, time, Decimal, UUID and bytes are tagged as kombu tags them. ``1``, ``1.0``, ``True``, ``"1"`` differ.
Sets and other objects, which only pickle can send, are reduced as pickle reduces them, to names and state; what cannot
be reduced has no stable form and is refused. ``repr`` was rejected: it shows addresses and the order of sets.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from taskguard.errors import ConfigurationError

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), check_circular=False).encode
_EXACT = (str, int, bool)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


def fingerprint(args: Sequence[Any], kwargs: Mapping[str, Any], signature: inspect.Signature | None = None) -> str:
    """128 bits of BLAKE2b over the call, as 32 hexadecimal digits.

    With *signature* (as the caller sees it, without ``self``), positional and keyword spelling of the same call are
    equal, and an argument equal to its default counts as not given, so that a new parameter with a default leaves old
    fingerprints as they are. A call that does not fit the signature has a fingerprint too. Raises ConfigurationError
    for a value without a stable form.
    """
    form = [[], list(args), kwargs] if signature is None else _bound(args, kwargs, signature)
    return hashlib.blake2b(canonical(form), digest_size=16).hexdigest()


def canonical(value: Any) -> bytes:
    """The canonical form of a value. Raises ConfigurationError where it has none."""
    try:
        return _encode(_plain(value)).encode("ascii")
    except RecursionError:
        raise ConfigurationError(
            f"{type(value).__name__}: nested too deeply, or in itself, for a fingerprint; give the task flat arguments"
        ) from None
    except ValueError as exc:
        if isinstance(exc, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{type(value).__name__}: cannot be written as JSON ({exc}); send it as text"
        ) from None


def _bound(args: Sequence[Any], kwargs: Mapping[str, Any], signature: inspect.Signature) -> list[Any]:
    named: list[Any] = []
    rest = dict(kwargs)
    index = 0
    for name, parameter in signature.parameters.items():
        kind = parameter.kind
        if kind is parameter.VAR_POSITIONAL or kind is parameter.VAR_KEYWORD:
            continue
        if kind is not parameter.KEYWORD_ONLY and index < len(args):
            value = args[index]
            index += 1
        elif kind is not parameter.POSITIONAL_ONLY and name in rest:
            value = rest.pop(name)
        else:
            continue
        default = parameter.default
        if default is parameter.empty or not _same(value, default):
            named.append([name, value])
    return [named, list(args[index:]), rest]


def _same(value: Any, default: Any) -> bool:
    kind = type(value)
    if value is default:
        return True
    if kind is type(default) and kind in _EXACT:
        return bool(value == default)
    # A default may be a sentinel without a stable form; it is then only equal to itself.
    try:
        return canonical(value) == canonical(default)
    except ConfigurationError:
        return False


def _plain(value: Any) -> Any:
    kind = type(value)
    if value is None or kind is str or kind is int or kind is float or kind is bool:
        return value
    if kind is list or kind is tuple:
        return [_plain(item) for item in value]
    if kind is dict:
        return {key if type(key) is str else _key(key): _plain(item) for key, item in value.items()}
    return _other(value)


def _other(value: Any) -> Any:
    match value:
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {_key(key): _plain(item) for key, item in value.items()}
    reduce_to_json = getattr(value, "__json__", None)  # kombu asks for it first, too
    if reduce_to_json is not None and not isinstance(value, type):
        return _plain(reduce_to_json())
    for kind, tag, form in _TAGGED:
        if isinstance(value, kind):
            return _tagged(tag, form(value))
    match value:
        case bytes():
            try:
                return _tagged("bytes", value.decode("utf-8"))
            except UnicodeDecodeError:
                return _tagged("base64", base64.b64encode(value).decode("ascii"))
        case set() | frozenset():
            return _tagged("set", sorted(canonical(item).decode("ascii") for item in value))
    return _tagged("object", _reduced(value))


def _tagged(tag: str, form: Any) -> dict[str, Any]:
    return {"__type__": tag, "__value__": form}


# datetime comes before date, because it is one.
_TAGGED: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (datetime, "datetime", datetime.isoformat),
    (date, "date", date.isoformat),
    (time, "time", time.isoformat),
    (Decimal, "decimal", str),
    (UUID, "uuid", lambda value: {"hex": value.hex}),
)


def _key(key: Any) -> str:
    """A dict's key as JSON writes it; one that JSON cannot write, by its canonical form."""
    if isinstance(key, str):
        return str.__str__(key)
    return canonical(key).decode("ascii")


def _reduced(value: Any) -> Any:
    if isinstance(value, _NAMED):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        reduced = value.__reduce_ex__(2)
    except Exception as exc:  # noqa: BLE001 - any object's own code; what it raises says that pickle cannot send it either
        raise ConfigurationError(
            f"{type(value).__name__}: a value of this type has no stable form for a fingerprint ({exc}); "
            "give the task plain data, or the type a __json__ method"
        ) from None
    if isinstance(reduced, str):
        return f"{type(value).__module__}.{reduced}"
    make, made_of, state, items, pairs = (*reduced, None, None, None)[:5]
    pairs = None if pairs is None else sorted(canonical(list(pair)).decode("ascii") for pair in pairs)
    return _plain([make, made_of, state, None if items is None else list(items), pairs])
