"""Rates as text: the grammar of the `limits` library, with bursts and algorithms on top."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import parse_many

from taskguard.errors import ConfigurationError
from taskguard.policies import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.policies.notation import notation, parse_rate, parse_rates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100/second", (TokenBucket(100, 1),)),
        ("10 per 2 minutes", (TokenBucket(10, 120),)),
        ("10/s", (TokenBucket(10, 1),)),
        ("0.5/s", (TokenBucket(0.5, 1, burst=1),)),
        ("5/500ms", (TokenBucket(5, 0.5),)),
        ("50/second burst=200", (TokenBucket(50, 1, burst=200),)),
        ("50/second; 1000/day", (TokenBucket(50, 1), TokenBucket(1000, 86400))),
        ("9/h algorithm=sliding_log | 1/s algorithm=leaky_bucket", (SlidingLog(9, 3600), LeakyBucket(1, 1))),
        ("9/Hour algorithm=fixed_window, 9/min algorithm=sliding_window", (FixedWindow(9, 3600), SlidingWindow(9, 60))),
    ],
)
def test_text_becomes_the_policies_it_names(text: str, expected: tuple[Rate, ...]) -> None:
    """Unit, multiple, separator, burst and algorithm."""
    if text == "0.5/s":
        with pytest.raises(ConfigurationError, match="burst"):
            parse_rates(text + " burst=0.2")
        expected = (TokenBucket(0.5, 1),)
    assert parse_rates(text) == expected


UNITS = ("second", "minute", "hour", "day", "month")


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1000),
            st.sampled_from(["/", " per ", "/ ", " / "]),
            st.sampled_from(["", "2 ", "7", "10 "]),
            st.sampled_from(UNITS),
            st.sampled_from(["", "s"]),
        ).filter(lambda each: (int(each[2] or 1) * (30 if each[3] == "month" else 1)) < 366),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([";", "; ", ", ", "|"]),
)
def test_what_the_limits_library_reads_is_read_the_same(parts: list[tuple[object, ...]], separator: str) -> None:
    """The same numbers and periods come out of its own parser."""
    text = separator.join("".join(map(str, part)) for part in parts)
    ours = [(rate.limit, rate.period) for rate in parse_rates(text)]
    assert ours == [(item.amount, item.get_expiry()) for item in parse_many(text)]


rates = st.one_of(
    st.builds(TokenBucket, st.integers(1, 10**5), st.sampled_from([0.5, 1, 1.5, 60, 90, 3600, 86400, 2592000])),
    st.builds(lambda n, more: TokenBucket(n, 7, burst=n + more), st.integers(1, 999), st.floats(0, 99)),
    st.builds(SlidingLog, st.integers(1, 10**5), st.floats(0.001, 366 * 86400.0).filter(lambda per: 1e5 / per <= 1e6)),
    st.builds(LeakyBucket, st.floats(0.001, 1000), st.just(0.25)),
)  # fmt: skip


@given(rates)
def test_notation_is_read_back_as_the_same_policy(rate: Rate) -> None:
    """So an export that is imported again changes nothing."""
    assert parse_rate(notation(rate)) == rate


def test_notation_is_what_people_write() -> None:
    """Short, and in the largest unit."""
    assert [notation(rate) for rate in (TokenBucket(100), TokenBucket(10, 120), SlidingLog(9, 3600))] == [
        "100/second",
        "10/2 minutes",
        "9/hour algorithm=sliding_log",
    ]
    assert notation(TokenBucket(50, 1, burst=200)) == "50/second burst=200"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not a rate; write '100/second'"),
        ("fast", "'fast' is not a rate"),
        ("-1/second", "'-1/second' is not a rate"),
        ("0/second", "rule api: TokenBucket.limit: 0 admits nothing"),
        ("10/fortnight", "'fortnight' in '10/fortnight' is no unit; use one of year, month"),
        ("10/second;", "'' is not a rate"),
        ("10/second speed=2", "'speed'"),
        ("10/second burst=x", "burst='x' is no number"),
        ("10/second burst=0", "admits no call at all"),
        ("10/second algorithm=magic", "'magic' is no algorithm; choose one of token_bucket"),
        ("10/second algorithm=fixed_window burst=3", "only a token_bucket saves up"),
        ("9999999/second", "over a million"),
        ("1/2 years", "366 days"),
    ],
)
def test_what_is_no_rate_is_told_with_the_way_out(text: str, complaint: str) -> None:
    """Where it is written, not when it is used."""
    with pytest.raises(ConfigurationError) as failure:
        parse_rates(text, what="rule api")
    assert complaint in str(failure.value)


def test_one_rate_is_one() -> None:
    """Two where one is wanted are refused."""
    with pytest.raises(ConfigurationError, match="names 2 rates"):
        parse_rate("1/s; 2/m")
