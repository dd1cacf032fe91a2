"""Idempotency keys: from a declaration on the task and the arguments of a call to one string.

A template is read once, when the task is declared, so that a wrong name fails at import. A key is what the template
says, letter for letter, because people look for it in a payment provider's books; two calls whose keys collide anyway
differ in their fingerprints, which the store answers with a conflict and never with silence. What would unite
unrelated calls (None, an empty value) or tell equal ones apart (an object's address, the order of a set) is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from string import Formatter
from typing import Any
from uuid import UUID

from taskguard.errors import ConfigurationError
from taskguard.fingerprint import canonical, fingerprint

__all__ = ["MAX_LENGTH", "KeyMaker", "canonical", "check_key", "fingerprint", "key_maker"]

MAX_LENGTH = 512

KeyMaker = Callable[[Sequence[Any], Mapping[str, Any]], str]
_Arguments = Callable[[Sequence[Any], Mapping[str, Any]], Any]
_Step = Callable[[Any], Any]

_FIELD = re.compile(r"(?P<name>[^\W\d]\w*)(?P<path>(?:\.\w+|\[[^\[\]]+\])*)")
_PATH = re.compile(r"\.(\w+)|\[([^\[\]]+)\]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCALARS = (str, int, float, Decimal, UUID, date, time, timedelta)


class _Missing(Exception):
    """The call does not give the argument."""


def key_maker(declared: str | Callable[..., str] | None, signature: inspect.Signature, *, task: str) -> KeyMaker | None:
    """What makes the key of each call of *task*; None where no key is declared.

    *declared* is a ``str.format`` template over the arguments, such as ``"charge:{order[id]}"``, or a function that
    takes the task's arguments and returns the key. *signature* is the task's as its caller sees it, without ``self``.
    Raises ConfigurationError for a template that names an argument the task does not have; the maker raises it for a
    call whose key would be empty, too long or the same as that of unrelated calls.
    """
    if declared is None:
        return None
    if isinstance(declared, str):
        return _from_template(declared, signature, task=task)
    if not callable(declared):
        raise ConfigurationError(
            f"{task}: idempotency_key {declared!r} is neither a template nor a function; "
            'write "charge:{order_id}" or give a function of the arguments'
        )

    return lambda args, kwargs: check_key(declared(*args, **kwargs), task=task)


def check_key(key: object, *, task: str) -> str:
    """The key itself, if it can be one: a non-empty ``str`` of 512 printable characters at most.

    Raises ConfigurationError.
    """
    if not isinstance(key, str):
        raise ConfigurationError(f"{task}: idempotency key {_short(key)} is a {type(key).__name__}; make it a str")
    if not key or key.isspace():
        raise ConfigurationError(f"{task}: idempotency key {key!r} is empty and would unite unrelated calls")
    if len(key) > MAX_LENGTH:
        raise ConfigurationError(
            f"{task}: idempotency key {_short(key)} has {len(key)} characters and may have {MAX_LENGTH}; "
            "use an id, or a digest of the text"
        )
    # isprintable is the fast way out; what it refuses beyond control characters (a no-break space) may stay.
    if not key.isprintable() and (found := _CONTROL.search(key)):
        raise ConfigurationError(
            f"{task}: idempotency key {_short(key)} has the control character {found[0]!r}; "
            "strip it, or use a digest of the text"
        )
    return key


def _from_template(template: str, signature: inspect.Signature, *, task: str) -> KeyMaker:
    what = f"{task}: idempotency_key {template!r}"
    if not template or template.isspace():
        raise ConfigurationError(f"{what} is empty; name an argument, such as {{order_id}}, or leave it out")
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as exc:
        raise ConfigurationError(f"{what} is no template ({exc}); double a brace that is meant as one") from None
    pieces: list[str | tuple[str, _Arguments]] = []
    open_end = False
    for literal, field, spec, conversion in parsed:
        if literal:
            pieces.append(literal)
        if field is None:
            continue
        if conversion or (spec and "{" in spec):
            raise ConfigurationError(f"{what}: {{{field}}} may have a plain format after a colon, and nothing else")
        if open_end and not literal and not spec:
            raise ConfigurationError(
                f"{what}: nothing stands before {{{field}}}, so 1 and 12 would meet 11 and 2; put a separator there"
            )
        open_end = not spec
        pieces.append((field, _field(field, spec or "", signature, what=what, task=task)))
    return _joined(pieces, task=task)


def _joined(pieces: Sequence[str | tuple[str, _Arguments]], *, task: str) -> KeyMaker:
    makers = [piece if isinstance(piece, str) else piece[1] for piece in pieces]
    match makers:
        case [str() as prefix, value] if not isinstance(value, str):
            return lambda args, kwargs: check_key(prefix + value(args, kwargs), task=task)

    def from_all(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        key = "".join([maker if isinstance(maker, str) else maker(args, kwargs) for maker in makers])
        return check_key(key, task=task)

    return from_all


def _field(field: str, spec: str, signature: inspect.Signature, *, what: str, task: str) -> _Arguments:
    match = _FIELD.fullmatch(field)
    if match is None:
        raise ConfigurationError(f"{what}: {{{field}}} does not name an argument; {_known(signature)}")
    name, steps = match["name"], [_step(a, i, what=what) for a, i in _PATH.findall(match["path"])]
    if name not in signature.parameters:
        raise ConfigurationError(f"{what} names {name!r}, which is no argument of the task; {_known(signature)}")
    argument = _argument(name, signature)
    subject = f"{task}: idempotency key field {{{field}}}"

    def text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        try:
            value = argument(args, kwargs)
            for step in steps:
                value = step(value)
        except _Missing:
            raise ConfigurationError(f"{subject} is not among the arguments of this call; give {name!r}") from None
        except (LookupError, AttributeError, TypeError) as exc:
            raise ConfigurationError(
                f"{subject} cannot be read ({type(exc).__name__}: {exc}); "
                "a key of a dict is written [key], an attribute .name"
            ) from None
        kind = type(value)
        if not spec:
            if kind is str and value:
                return value  # type: ignore[no-any-return]
            if kind is int:
                return str(value)
        return _scalar(value, spec, subject=subject)

    return text


def _argument(name: str, signature: inspect.Signature) -> _Arguments:
    """A function that finds the argument in a call, ten times as fast as ``signature.bind``."""
    parameters = signature.parameters
    parameter = parameters[name]
    index = list(parameters).index(name)
    if parameter.kind is parameter.VAR_POSITIONAL:
        return lambda args, kwargs: args[index:]
    if parameter.kind is parameter.VAR_KEYWORD:
        taken = {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return lambda args, kwargs: {key: value for key, value in kwargs.items() if key not in taken}
    if parameter.kind is parameter.KEYWORD_ONLY:
        index = 1 << 62
    by_keyword = parameter.kind is not parameter.POSITIONAL_ONLY
    default = parameter.default

    def find(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if index < len(args):
            return args[index]
        if by_keyword and name in kwargs:
            return kwargs[name]
        if default is parameter.empty:
            raise _Missing
        return default

    return find


def _step(attribute: str, item: str, *, what: str) -> _Step:
    if attribute.startswith("_"):
        raise ConfigurationError(f"{what}: the attribute {attribute!r} is private; use a public one, or a function")
    if attribute:
        return lambda value: getattr(value, attribute)
    return lambda value: value[int(item) if item.isdecimal() and not isinstance(value, Mapping) else item]


def _scalar(value: Any, spec: str, *, subject: str) -> str:
    if value is None or value == "":
        raise ConfigurationError(
            f"{subject} is {value!r}, which would unite unrelated calls; give it a value, or pass idempotency_key"
        )
    if not isinstance(value, _SCALARS):
        raise ConfigurationError(
            f"{subject} is a {type(value).__name__}, whose text is not the same everywhere; "
            "name a part of it that is text or a number, or use a function"
        )
    # An enum that is a str or int is its plain value on the other side of the broker.
    if isinstance(value, str):
        value = str.__str__(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = int(value)
    try:
        return format(value, spec)
    except (ValueError, TypeError) as exc:
        raise ConfigurationError(f"{subject} cannot be written as {spec!r} ({exc}): {_short(value)}") from None


def _known(signature: inspect.Signature) -> str:
    return f"there are {', '.join(signature.parameters)}" if signature.parameters else "it takes none"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
