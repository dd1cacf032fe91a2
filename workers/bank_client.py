"""Talks to the bank. Trouble that may pass raises BankUnavailable, a refusal raises BankRefused."""

from __future__ import annotations

import json
import os
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

TIMEOUT = 10.0


class BankUnavailable(ConnectionError):
    """The bank is down, busy or out of reach. ``retry_after``: seconds it asked for, None when it did not say."""

    retry_after: float | None = None


class BankRefused(Exception):
    """The bank will not do it, however often it is asked. ``status_code`` is its HTTP status."""

    status_code: int = 0


def post(
    path: str, content: dict[str, Any], *, key: str | None, caller: str = "", timeout: float | None = None
) -> dict[str, Any]:
    """Ask the bank for one thing, under one idempotency key. *timeout* (seconds) is cut at 10."""
    headers = {"Content-Type": "application/json", "User-Agent": caller or "workers"}
    if key is not None:
        headers["Idempotency-Key"] = key
    url = os.environ.get("BANK_URL", "http://127.0.0.1:8080") + path
    request = Request(url, data=json.dumps(content).encode(), headers=headers)
    try:
        with urlopen(request, timeout=max(0.1, min(TIMEOUT, timeout or TIMEOUT))) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except HTTPError as exc:
        raise _trouble(exc) from None
    except (OSError, HTTPException) as exc:
        raise BankUnavailable(f"{url}: {exc}") from exc


def _trouble(error: HTTPError) -> Exception:
    try:
        reason = json.load(error)["error"]
    except (ValueError, KeyError, TypeError):
        reason = error.reason
    if error.code == 429 or error.code >= 500:
        unavailable = BankUnavailable(f"{error.code}: {reason}")
        wait = error.headers.get("Retry-After", "")
        unavailable.retry_after = float(wait) if wait.isdigit() else None
        return unavailable
    refused = BankRefused(f"{error.code}: {reason}")
    refused.status_code = error.code
    return refused
