"""Circuit breakers as they are declared: what cannot work fails there, with the value and the way out."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest

from taskguard.errors import ConfigurationError
from taskguard.policies.circuit import CircuitBreaker


def refusal(**options: object) -> str:
    """What is said of a declaration that cannot work: one line."""
    with pytest.raises(ConfigurationError) as info:
        CircuitBreaker(**options)  # type: ignore[arg-type]
    text = str(info.value)
    assert "\n" not in text
    return text


def test_a_breaker_needs_no_options() -> None:
    """Half of at least ten calls in the last minute; a probe after half a minute."""
    breaker = CircuitBreaker()
    assert (breaker.failure_rate_threshold, breaker.minimum_calls, breaker.window_size) == (0.5, 10, 60.0)
    assert (breaker.wait_in_open, breaker.probes_in_half_open) == (30.0, 1)


def test_durations_are_seconds_timedeltas_or_text() -> None:
    """And are kept as seconds."""
    breaker = CircuitBreaker(window_size="2m", wait_in_open=timedelta(seconds=5), slow_start=0)  # type: ignore[arg-type]
    assert (breaker.window_size, breaker.wait_in_open, breaker.slow_start) == (120.0, 5.0, 0.0)


@pytest.mark.parametrize("name", ["failure_rate_threshold", "slow_call_rate_threshold"])
@pytest.mark.parametrize("share", [0, 1.01, 50], ids=str)
def test_a_threshold_is_a_share(name: str, share: float) -> None:
    """Fifty is not fifty per cent, and zero would open at once."""
    options = {name: share, **({"slow_call_duration": 1} if "slow" in name else {})}
    assert (
        refusal(**options) == f"CircuitBreaker.{name}: {share!r} is no share; give more than 0, up to 1 (0.5 is half)"
    )


@pytest.mark.parametrize("share", [-0.1, math.nan, True, "0.5"], ids=str)
def test_a_threshold_that_is_no_number_is_refused(share: object) -> None:
    """With its name and value."""
    text = refusal(failure_rate_threshold=share)
    assert text == f"CircuitBreaker.failure_rate_threshold: {share!r} must be a number, 0 or more"


@pytest.mark.parametrize("half", [{"slow_call_rate_threshold": 0.5}, {"slow_call_duration": 2}], ids=str)
def test_slow_calls_need_both_their_options(half: dict[str, float]) -> None:
    """One of them alone would never do anything."""
    assert refusal(**half) == (
        "CircuitBreaker: slow_call_rate_threshold and slow_call_duration are of use only together; give both"
    )


@pytest.mark.parametrize("name", ["minimum_calls", "probes_in_half_open", "success_threshold"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None], ids=str)
def test_counts_are_whole_numbers(name: str, value: object) -> None:
    """One or more."""
    assert refusal(**{name: value}) == f"CircuitBreaker.{name}: {value!r} must be a whole number, 1 or more"


@pytest.mark.parametrize("name", ["window_size", "wait_in_open", "max_wait_in_open", "probe_lease", "slow_start"])
@pytest.mark.parametrize("value", [-1, math.inf, "soon", True], ids=str)
def test_durations_that_are_none_are_refused(name: str, value: object) -> None:
    """With their name and value."""
    assert refusal(**{name: value}).startswith(f"CircuitBreaker.{name}: {value!r} is ")


@pytest.mark.parametrize("name", ["window_size", "wait_in_open", "probe_lease"])
def test_a_duration_of_zero_that_decides_nothing_is_refused(name: str) -> None:
    """A window without length, a wait that is none, a probe that is over when it begins."""
    assert refusal(**{name: 0}) == f"CircuitBreaker.{name}: 0 decides nothing; give more than zero"


def test_the_bound_of_the_wait_is_not_below_it() -> None:
    """The first wait would never be kept."""
    assert refusal(wait_in_open=700) == (
        "CircuitBreaker.max_wait_in_open: 600.0 is less than wait_in_open 700.0; raise it"
    )


@pytest.mark.parametrize("value", [0.5, 0, math.nan, True], ids=str)
def test_the_backoff_does_not_shrink(value: object) -> None:
    """One keeps the wait as it is."""
    assert refusal(backoff=value) == f"CircuitBreaker.backoff: {value!r} must be a number, 1 or more"
    assert CircuitBreaker(backoff=1).backoff == 1.0


def test_a_counted_window_holds_whole_calls() -> None:
    """Half a call is none."""
    assert refusal(window="count", window_size=10.5) == ("CircuitBreaker.window_size: 10.5 calls; give a whole number")


@pytest.mark.parametrize("name", ["minimum_calls", "probes_in_half_open"])
def test_a_count_over_the_window_could_never_be_reached(name: str) -> None:
    """A circuit that can never open, or never close."""
    assert refusal(**{"window": "count", "window_size": 5, "minimum_calls": 5, name: 6}) == (
        f"CircuitBreaker.{name}: 6 is over the window of 5 calls and could never be reached; "
        "lower it or raise window_size"
    )


@pytest.mark.parametrize(
    ("name", "choices"),
    [("window", "'time', 'count'"), ("on_open", "'defer', 'fallback', 'dead_letter', 'pause_queue'")],
)
def test_a_word_that_is_not_known_is_answered_with_those_that_are(name: str, choices: str) -> None:
    """A misspelt option does not mean its default."""
    assert refusal(**{name: "nope"}) == f"CircuitBreaker.{name}: 'nope' is not known; choose one of {choices}"


@pytest.mark.parametrize("name", ["expected", "ignored"])
def test_exceptions_are_classes(name: str) -> None:
    """One alone will do; what is none is named."""
    breaker = CircuitBreaker(**{name: KeyError})  # type: ignore[arg-type]
    assert getattr(breaker, name) == (KeyError,)
    assert refusal(**{name: ("KeyError",)}) == (
        f"CircuitBreaker.{name}: 'KeyError' is no exception class; give classes, such as (TimeoutError,)"
    )


def test_on_change_is_a_function() -> None:
    """Not the name of one."""
    assert refusal(on_change="alert") == "CircuitBreaker.on_change: 'alert' cannot be called; give a function"
