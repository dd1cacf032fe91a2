"""Whose call it is: from a limit's key and the arguments of a call to the name of one counter.

A key is quoted before it becomes part of a name, so no key can be another limit's, whatever separators it holds; one
that is too long for a name is told apart by its digest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from string import Formatter
from typing import Any
from urllib.parse import quote

from taskguard.errors import ConfigurationError
from taskguard.policies.calls import Key

LONGEST = 120
"""Characters of a quoted key; a longer one is cut and gets a digest."""

_formatter = Formatter()


def counter(name: str, key: object) -> str:
    """The name of the counter of *key* under the limit *name*."""
    if key is None or key == "":
        raise ConfigurationError(
            f"{name}: the key of this call is {key!r}, which would unite unrelated calls; give one"
        )
    text = quote(str(key), safe="")
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}~{sha256(text.encode()).hexdigest()[:16]}"
    return f"{name}={text}"


def key_of(
    key: Key, fn: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any], *, what: str
) -> Any:
    """What *key*, a template or a function, makes of this call. Raises ConfigurationError for an unknown argument."""
    if not isinstance(key, str):
        return key(*args, **kwargs)
    known = _arguments(fn, args, kwargs)
    try:
        return _formatter.vformat(key, (), known)
    except (KeyError, IndexError, AttributeError) as exc:
        raise ConfigurationError(
            f"{what}: key {key!r} finds no {exc} in the arguments of this call, which has {sorted(known) or 'none'}; "
            "name an argument, or give key= to permit() or using()"
        ) from None


def _arguments(fn: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    signature = (
        None if fn is None else _signature(getattr(fn, "__func__", fn), getattr(fn, "__self__", None) is not None)
    )
    if signature is None:
        return dict(kwargs)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    bound.apply_defaults()
    found = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found


@functools.lru_cache(maxsize=1024)
def _signature(fn: Callable[..., Any], bound: bool) -> inspect.Signature | None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return None
    parameters = list(signature.parameters.values())
    return signature.replace(parameters=parameters[1:]) if bound and parameters else signature
