"""Policies: validated when they are made, with the value and the way out in the message."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from taskguard.errors import ConfigurationError
from taskguard.policies import Budget, Retry, RetryEvent


def test_the_defaults_are_three_retries_with_full_jitter() -> None:
    """A bare `Retry()` is safe to use."""
    policy = Retry()
    assert (policy.max_retries, policy.backoff, policy.jitter) == (3, "exponential", "full")
    assert (policy.first_delay, policy.factor, policy.max_delay) == (1.0, 2.0, 600.0)
    assert (policy.retry_after, policy.max_retry_after, policy.budget) == (True, 3600.0, None)


def test_durations_are_kept_as_seconds() -> None:
    """A timedelta and a number say the same."""
    policy = Retry(first_delay=timedelta(milliseconds=500), max_delay=timedelta(minutes=1), max_retry_after=60)
    assert policy == Retry(first_delay=0.5, max_delay=60, max_retry_after=timedelta(seconds=60))
    assert isinstance(policy.max_delay, float)
    assert Budget(window=timedelta(seconds=3)).window == 3.0


@pytest.mark.parametrize("policy", [Retry(), Budget()], ids=lambda p: type(p).__name__)
def test_a_policy_cannot_be_changed(policy: Any) -> None:
    """A policy is shared by threads and tasks."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, dataclasses.fields(policy)[0].name, 1)
    assert not hasattr(policy, "__dict__")


def test_one_class_or_a_list_of_classes_is_taken_as_a_tuple() -> None:
    """What Celery users write for ``autoretry_for`` works."""
    assert Retry(retry_on=TimeoutError).retry_on == (TimeoutError,)  # type: ignore[arg-type]
    assert Retry(dont_retry_on=[KeyError]).dont_retry_on == (KeyError,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (Retry, {"max_retries": -1}, "Retry.max_retries: -1 must be a whole number, 0 or more, or None"),
        (Retry, {"max_retries": 2.5}, "Retry.max_retries: 2.5"),
        (Retry, {"max_retries": True}, "Retry.max_retries: True"),
        (Retry, {"backoff": "linear"}, "Retry.backoff: 'linear' is not known; choose one of 'exponential', 'fixed'"),
        (Retry, {"jitter": "half"}, "Retry.jitter: 'half' is not known"),
        (Retry, {"first_delay": -1}, "Retry.first_delay: -1 is out of range"),
        (Retry, {"first_delay": None}, "Retry.first_delay: None is not a duration"),
        (Retry, {"factor": 0.5}, "Retry.factor: 0.5 must be a number, 1 or more"),
        (Retry, {"factor": float("inf")}, "Retry.factor: inf"),
        (Retry, {"factor": "2"}, "Retry.factor: '2'"),
        (Retry, {"first_delay": 10, "max_delay": 5}, "Retry.max_delay: 5.0 is less than first_delay 10.0"),
        (Retry, {"first_delay": 0, "max_retries": None}, "first_delay 0 with max_retries None never rests"),
        (Retry, {"backoff": "fixed", "jitter": "decorrelated"}, "use 'full' or 'none'"),
        (Retry, {"retry_on": ("ValueError",)}, "Retry.retry_on: 'ValueError' is no exception class"),
        (Retry, {"dont_retry_on": (int,)}, "Retry.dont_retry_on: <class 'int'> is no exception class"),
        (Retry, {"retry_if": "always"}, "Retry.retry_if: 'always' cannot be called"),
        (Retry, {"on_retry": 1}, "Retry.on_retry: 1 cannot be called"),
        (Retry, {"retry_after": 30}, "Retry.retry_after: 30 is neither True nor False; the bound is max_retry_after"),
        (Retry, {"budget": 0.2}, "Retry.budget: 0.2 is no Budget"),
        (Budget, {"ratio": -0.1}, "Budget.ratio: -0.1 must be a number, 0 or more"),
        (Budget, {"min_per_second": float("nan")}, "Budget.min_per_second: nan"),
        (Budget, {"window": 0}, "Budget.window: 0 counts nothing"),
        (Budget, {"ratio": 0, "min_per_second": 0.05}, "never allow a retry within window 10.0"),
    ],
)
def test_a_policy_that_cannot_work_is_refused_when_made(make: Any, fields: dict[str, Any], message: str) -> None:
    """The error names what, the value and the way out."""
    with pytest.raises(ConfigurationError) as caught:
        make(**fields)
    assert message in str(caught.value)


def test_an_event_says_what_is_retried() -> None:
    """What ``on_retry`` can rely on."""
    event = RetryEvent(task="t", task_id="1", attempt=2, error=TimeoutError("slow"), delay=1.5)
    assert (event.attempt, str(event.error), event.delay) == (2, "slow", 1.5)
