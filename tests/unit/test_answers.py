"""What an HTTP answer says about the downstream."""

from __future__ import annotations

from email.utils import formatdate

import pytest

from taskguard.downstream.answers import LONGEST_PAUSE, of_error, read

NOW = 1_750_000_000.0


@pytest.mark.parametrize(
    ("status", "headers", "failed", "wait"),
    [
        (200, {}, False, None),
        (404, {}, False, None),
        (500, {}, True, None),
        (503, {"Retry-After": "7"}, True, 7.0),
        (429, {"retry-after": "7"}, True, 7.0),
        (429, {"Retry-After": formatdate(NOW + 90, usegmt=True)}, True, 90.0),
        (429, {"Retry-After": "soon"}, True, None),
        (429, {"Retry-After": "1e9"}, True, None),
        (429, {"Retry-After": "999999"}, True, LONGEST_PAUSE),
        (429, {"RateLimit-Reset": "30"}, True, 30.0),
        (429, {"RateLimit": '"default";r=0;t=12'}, True, 12.0),
        (200, {"RateLimit": '"default";r=0;t=12'}, False, 12.0),
        (200, {"RateLimit": '"default";r=5;t=12'}, False, None),
        (200, {"RateLimit-Remaining": "0", "RateLimit-Reset": "3"}, False, 3.0),
        (200, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1750000100"}, False, None),
        (301, {"Retry-After": "7"}, False, None),
        (404, {"RateLimit-Remaining": "0", "RateLimit-Reset": "3"}, False, None),
    ],
)
def test_it_is_read_as_the_standards_say(
    status: int, headers: dict[str, str], failed: bool, wait: float | None
) -> None:
    """5xx and 429 are failures; a wait is seconds, a date, or a reset in seconds; an epoch of a house's own is not."""
    answer = read(status, headers, now=NOW)
    assert (answer.failed, answer.wait) == (failed, wait)


def test_it_is_found_in_errors_by_shape() -> None:
    """httpx and requests carry a response, aiohttp the status itself; others nothing."""

    class Response:
        status_code = 429
        headers = {"Retry-After": "3"}  # noqa: RUF012

    class Carrier(Exception):
        response = Response()

    class Bare(Exception):
        status = 503
        headers = {"Retry-After": "4"}  # noqa: RUF012

    class Odd(Exception):
        status = 429
        headers = "Retry-After: 4"

    waits = [
        found.wait if (found := of_error(each(), now=NOW)) else "none" for each in (Carrier, Bare, Odd, ValueError)
    ]
    assert waits == [3.0, 4.0, None, "none"]
