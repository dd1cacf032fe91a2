"""Text for terminals. What comes out of a message may be hostile: nothing in it may move the cursor or hide."""

from __future__ import annotations

import unicodedata

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_AGES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def clean(text: str, *, lines: bool = False) -> str:
    """*text* with control, format and unassigned characters written as escapes; with *lines*, newlines stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" and lines else c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSEEN else c
        for c in text
    )


def one_line(text: str) -> str:
    """*text* on one line, safe to print."""
    return clean(" ".join(text.split()))


def plural(count: int, noun: str) -> str:
    """``1 dead letter``, ``2,000 dead letters``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def age(seconds: float) -> str:
    """A duration in its largest whole unit: ``3h``."""
    for size, unit in _AGES:
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return "0s"
