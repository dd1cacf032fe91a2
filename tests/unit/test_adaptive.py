"""A limit that finds its own place: the pure step, and what feeds it."""

from __future__ import annotations

from typing import Any

import pytest

from taskguard.downstream.answers import Answer
from taskguard.errors import ConfigurationError, RateLimitedError
from taskguard.limits.adaptive import Step, step
from taskguard.permits import AdaptiveView
from taskguard.policies import Adaptive, Limit
from tests.unit.permithouse import PermitHouse

POLICY = Adaptive(start=10, least=2, most=12, increase=1, decrease=0.5, interval=5)


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


@pytest.mark.parametrize(
    ("limit", "signal", "after"),
    [
        (None, "too_much", 5.0),
        (None, "well", 11.0),
        (11.5, "well", 12.0),
        (12.0, "well", None),
        (3.0, "too_much", 2.0),
        (2.0, "too_much", None),
        (8.0, "slow", 4.0),
    ],
)
def test_it_rises_by_steps_and_falls_by_shares_between_its_bounds(
    limit: float | None, signal: Any, after: float | None
) -> None:
    """AIMD, expectations written by hand."""
    view = None if limit is None else AdaptiveView(name="bank", limit=limit)
    taken = step(POLICY, view, signal, 100.0)
    assert (taken.limit if taken else None) == after
    assert taken is None or taken.why


def test_one_burst_of_refusals_is_one_step() -> None:
    """Answers to calls from before the last change do not change it again, nor do other processes that saw them."""
    view = AdaptiveView(name="bank", limit=5.0, changes=((100.0, 10.0, 5.0, "429"),))
    assert step(POLICY, view, "too_much", 104.9) is None
    assert step(POLICY, view, "well", 104.9) is None
    assert step(POLICY, view, "too_much", 105.0) == Step(2.5, "lowered from 5: it said too much")


def test_a_429_lowers_the_fleets_limit_and_says_why(permits: PermitHouse) -> None:
    """Every process is held to it with its next call; the change is in the store with its reason."""
    policy = Adaptive(start=10, least=2, most=20, decrease=0.5, per=60, burst=10)
    bank = permits.downstream(rate=policy)
    other = permits.downstream(desk=permits.another_desk(), rate=policy)
    with bank.permit() as permit:
        permit.answered(Answer(429))
    permits.desk.flush()
    view = permits.store.adaptive("bank")
    assert view is not None
    assert view.limit == 5
    assert [(after, why) for _, _, after, why in view.changes] == [(5.0, "lowered from 10: status 429")]
    other.call(lambda: None)
    assert other.guard.tuned("bank") == 5
    assert "5 per 60 s, adapting between 2 and 20; lowered from 10: status 429" in bank.explain()[1]
    assert [event.key for event in permits.told("limit_adapted")] == ["bank"]


def test_a_refusal_of_an_adaptive_limit_is_not_remembered(permits: PermitHouse) -> None:
    """The limit may rise before its retry_after is over."""
    bank = permits.downstream(rate=Adaptive(start=1, least=1, most=1000, per=60, burst=1))
    bank.call(lambda: None)
    with pytest.raises(RateLimitedError):
        bank.call(lambda: None)
    permits.store.adapt("bank", 1000, why="by hand")
    with pytest.raises(RateLimitedError) as caught:
        bank.call(lambda: None)
    permits.clock.advance(caught.value.retry_after or 0)
    assert permits.clock() < 1_750_000_001
    assert bank.call(lambda: 5) == 5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"start": 1, "least": 2, "most": 3}, "not between"),
        ({"start": 0, "least": 0, "most": 3}, "never lets a call through"),
        ({"start": 2, "least": 1, "most": 3, "decrease": 1}, "is no factor"),
        ({"start": 2, "least": 1, "most": 3, "interval": 0}, "measures nothing"),
    ],
)
def test_a_limit_that_cannot_adapt_is_a_mistake(options: dict[str, Any], complaint: str) -> None:
    """Told where it is declared."""
    with pytest.raises(ConfigurationError, match=complaint):
        Adaptive(**options)


def test_it_adapts_for_all_calls_alike() -> None:
    """A key would need a limit of its own for each."""
    with pytest.raises(ConfigurationError, match="adapts for all calls alike"):
        Limit(POLICY, key="{tenant}")
