"""Instants and durations."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from taskguard.clock import instant, iso, seconds, to_ms, wall_clock
from taskguard.errors import ConfigurationError

NOW = 1_750_000_000.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, 0.0),
        (1.5, 1.5),
        (timedelta(minutes=2), 120.0),
        ("90", 90.0),
        ("500ms", 0.5),
        ("15s", 15.0),
        ("5m", 300.0),
        ("1.5h", 5400.0),
        (" 7 d ", 604800.0),
    ],
)
def test_a_duration_is_seconds_a_timedelta_or_text(given: float | timedelta | str, expected: float) -> None:
    """Whatever form it comes in, it is seconds."""
    assert seconds(given) == expected


@pytest.mark.parametrize(
    "given",
    [
        -1,
        -0.001,
        timedelta(seconds=-1),
        float("nan"),
        float("inf"),
        1e12,
        "",
        "soon",
        "-5s",
        "5 weeks",
        "1e3",
        "s",
        "٣x",
    ],
)
def test_what_is_no_duration_is_refused_by_name(given: float | timedelta | str) -> None:
    """The error names the setting and the value."""
    with pytest.raises(ConfigurationError, match="lease: ") as caught:
        seconds(given, what="lease")
    assert repr(given) in str(caught.value)


@pytest.mark.parametrize("given", [None, True, False, [], b"15s", datetime.now(UTC)])
def test_a_value_of_another_type_is_no_duration(given: object) -> None:
    """A flag is not one second, and an instant is not a duration."""
    with pytest.raises(ConfigurationError, match="give seconds or a timedelta"):
        seconds(given)  # type: ignore[arg-type]


@given(st.text())
def test_text_is_a_duration_or_refused(text: str) -> None:
    """No text brings anything else out of it."""
    with suppress(ConfigurationError):
        assert 0 <= seconds(text) < 1e11


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (30, NOW + 30),
        ("30s", NOW + 30),
        (timedelta(minutes=1), NOW + 60),
        (datetime(2025, 1, 1, tzinfo=UTC), 1735689600.0),
        (datetime(2025, 1, 1), 1735689600.0),
        (datetime(2025, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), 1735689600.0),
        ("2025-01-01T00:00:00+00:00", 1735689600.0),
        ("2025-01-01T00:00:00Z", 1735689600.0),
        ("2025-01-01T00:00:00", 1735689600.0),
    ],
)
def test_an_instant_is_a_moment_or_a_duration_from_now(
    given: float | str | timedelta | datetime, expected: float
) -> None:
    """A moment without a zone is UTC, as in Celery."""
    assert instant(given, now=NOW) == expected


@pytest.mark.parametrize("given", ["tomorrow", "", "-5s", -1, None, True])
def test_what_is_no_instant_is_refused_by_name(given: object) -> None:
    """The error names the setting and the value."""
    with pytest.raises(ConfigurationError, match="eta: "):
        instant(given, now=NOW, what="eta")  # type: ignore[arg-type]


@given(st.integers(0, 2**45))
def test_milliseconds_survive_the_way_to_seconds_and_back(ms: int) -> None:
    """An instant read from a store is written back as the same number."""
    assert to_ms(ms / 1000) == ms


def test_the_wall_clock_can_be_frozen() -> None:
    """Users' tests move time with freezegun."""
    with freeze_time("2025-01-01") as frozen:
        assert wall_clock() == 1735689600.0
        frozen.tick(5)
        assert wall_clock() == 1735689605.0


def test_an_instant_is_shown_in_utc_to_the_second() -> None:
    """For people."""
    assert iso(1735689600.75) == "2025-01-01T00:00:00+00:00"
