"""What a declaration may be made of: each check returns the value as it is kept, or says what to write instead."""

from __future__ import annotations

import math

from taskguard.errors import ConfigurationError


def number(what: str, value: object, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise ConfigurationError(f"{what}: {value!r} must be a number, {least:g} or more")
    return float(value)


def one_of(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{what}: {value!r} is not known; choose one of {', '.join(map(repr, choices))}")


def exceptions(what: str, value: object) -> tuple[type[BaseException], ...]:
    classes = value if isinstance(value, (tuple, list, set, frozenset)) else (value,)
    for item in classes:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise ConfigurationError(f"{what}: {item!r} is no exception class; give classes, such as (TimeoutError,)")
    return tuple(classes)
