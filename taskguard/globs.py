"""Patterns of rules: a value as it is, or one with ``*``, which stands for any text. No other sign is special."""

from __future__ import annotations

from taskguard.errors import ConfigurationError

LONGEST = 256
"""Characters of an identity's field; what is longer is cut there (`identity`)."""


def check(id: str, name: str, pattern: object) -> None:
    """Raise ConfigurationError for what is no pattern, or could match no field of any identity."""
    if not isinstance(pattern, str):
        raise ConfigurationError(f"rule {id}: {name} {pattern!r} is no text; give a value or a glob such as 'acme-*'")
    trouble = ""
    if pattern and pattern != pattern.strip():
        trouble = "begins or ends with a space"
    elif not pattern.isprintable():
        trouble = "has a control character"
    elif len(pattern) > LONGEST:
        trouble = f"has more than {LONGEST} characters"
    elif name == "endpoint" and "?" in pattern:
        trouble = "has a query, which is no part of an endpoint"
    if trouble:
        raise ConfigurationError(
            f"rule {id}: {name} {pattern[:80]!r} {trouble} and would match nothing; leave that out"
        )


def matches(pattern: str, value: str) -> bool:
    """Whether *value* is what *pattern* means; nothing (an empty value) is meant only by an empty pattern."""
    if "*" not in pattern:
        return pattern == value
    head, *middle, tail = pattern.split("*")
    if not value or len(value) < len(head) + len(tail) or not value.startswith(head) or not value.endswith(tail):
        return False
    at, end = len(head), len(value) - len(tail)
    for part in middle:
        at = value.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True
