"""What an HTTP answer says about the downstream: did it fail, and did it ask to be left alone, for how long.

Read by shape, from a status and a mapping of headers, so that no client library is imported. Sources: RFC 9110
(Retry-After), draft-ietf-httpapi-ratelimit-headers (RateLimit, and the fields of its older drafts).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from taskguard.transient import retry_after

THROTTLED = frozenset({429, 503})
LONGEST_PAUSE = 3600.0
"""Seconds: a downstream that asks for more is asked again after this."""

_MEMBER = re.compile(r"(?:^|[;,\s])(r|t|remaining|reset)\s*=\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. ``wait``: seconds to leave the downstream alone, where it said so."""

    status: int
    wait: float | None = None

    @property
    def failed(self) -> bool:
        """Whether it is a failure of the downstream: 5xx, and 429."""
        return self.status >= 500 or self.status == 429

    @property
    def throttled(self) -> bool:
        """Whether it means "too much"."""
        return self.status in THROTTLED


@dataclass(frozen=True, slots=True)
class _Response:
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Error:
    response: _Response


def read(status: int, headers: Mapping[str, str], *, now: float) -> Answer:
    """The answer of this status. *now*: epoch seconds, for a Retry-After that is a date."""
    wait = None
    if status in THROTTLED or (300 <= status < 600 and _find(headers, "retry-after") is not None):
        lower = {name.lower(): value for name, value in headers.items()}
        wait = retry_after(_Error(_Response(lower)), now)  # type: ignore[arg-type]
        wait = wait if status in THROTTLED else None
    if wait is None and (status in THROTTLED or status < 400):
        wait = _exhausted(headers)
        if wait is None and status == 429:
            wait = _reset(headers)
    return Answer(status, None if wait is None else min(wait, LONGEST_PAUSE))


def of_error(exc: BaseException, *, now: float) -> Answer | None:
    """The answer that *exc* carries, as the errors of httpx, requests, aiohttp and their like do; None: none."""
    response = getattr(exc, "response", None)
    status = getattr(response, "status_code", None) or getattr(response, "status", None) or getattr(exc, "status", None)
    if not isinstance(status, int) or isinstance(status, bool):
        return None
    headers: Any = getattr(response, "headers", None) or getattr(exc, "headers", None)
    try:
        return read(status, headers if headers is not None and hasattr(headers, "items") else {}, now=now)
    except Exception:  # noqa: BLE001 (someone else's object, read on a guess)
        return Answer(status)


def _exhausted(headers: Mapping[str, str]) -> float | None:
    """Seconds until there are permits again, where the answer says that none is left."""
    left = _number(_find(headers, "ratelimit-remaining") or _find(headers, "x-ratelimit-remaining"))
    members = _members(headers)
    left = members.get("r", members.get("remaining", left))
    return _reset(headers) if left == 0 else None


def _reset(headers: Mapping[str, str]) -> float | None:
    members = _members(headers)
    found = members.get("t", members.get("reset"))
    return found if found is not None else _number(_find(headers, "ratelimit-reset"))


def _members(headers: Mapping[str, str]) -> dict[str, float]:
    text = _find(headers, "ratelimit") or ""
    return {name: float(value) for name, value in _MEMBER.findall(text)}


def _find(headers: Mapping[str, str], name: str) -> str | None:
    for key, value in headers.items():
        if key.lower() == name:
            return value
    return None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text.split(",")[0])
    except ValueError:
        return None
