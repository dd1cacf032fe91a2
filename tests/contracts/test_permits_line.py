"""Booked slots: refused calls come back one by one, at the permitted rate, in order. On every backend."""

from __future__ import annotations

import pytest

from taskguard.permits import Ask, RateAsk, Refusal
from taskguard.policies.rates import FixedWindow, Rate, TokenBucket
from taskguard.ports import PermitStore
from tests.contracts.permits import EVERY_RATE, START, MicroClock, admitted, at_once, kind, slot_in, take, wait_us

TWO_A_SECOND = TokenBucket(2, burst=1)


def booked_line(permits: PermitStore, count: int) -> list[float]:
    """The slots of *count* calls that are refused now."""
    return [slot_in(take(permits, TWO_A_SECOND, book=True)) for _ in range(count)]


def test_refused_calls_are_given_slots_one_interval_apart(permits: PermitStore) -> None:
    """Five refused at once come back half a second after each other, in the order in which they asked."""
    assert admitted(take(permits, TWO_A_SECOND))
    assert booked_line(permits, 5) == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_a_slot_is_as_far_behind_as_its_call_costs(permits: PermitStore) -> None:
    """A call of cost 2 needs two intervals; the one behind it again as many as it costs itself."""
    policy = TokenBucket(2, burst=2)
    assert at_once(permits, policy) == 2
    assert [slot_in(take(permits, policy, cost, book=True)) for cost in (1, 2, 1)] == [0.5, 1.5, 2.0]


def test_every_booked_call_is_admitted_at_its_slot(permits: PermitStore, micros: MicroClock) -> None:
    """Nobody who comes when told is refused a second time, and the line moves at the permitted rate."""
    policy = TokenBucket(30, burst=7)
    assert at_once(permits, policy) == 7
    slots = [slot_in(take(permits, policy, book=True)) for _ in range(60)]
    for slot in slots:
        micros.advance(slot - micros.passed / 1e6)
        assert admitted(take(permits, policy, booked=True)), slot
    assert slots[-1] == pytest.approx(60 / 30, rel=1e-3)


def test_who_has_not_booked_waits_behind_all_who_have(permits: PermitStore, micros: MicroClock) -> None:
    """Even where the rate would let it go: the permit is another's."""
    take(permits, TWO_A_SECOND)
    assert booked_line(permits, 3) == [0.5, 1.0, 1.5]
    micros.advance(0.5)
    answer = take(permits, TWO_A_SECOND)
    assert wait_us(answer) == 1_500_000
    assert admitted(take(permits, TWO_A_SECOND, booked=True))


def test_a_booking_that_nobody_uses_delays_nobody_longer_than_its_slot(
    permits: PermitStore, micros: MicroClock
) -> None:
    """When the last booked slot is past, the line is empty, whoever came."""
    take(permits, TWO_A_SECOND)
    assert booked_line(permits, 3)[-1] == 1.5
    micros.advance(1.5)
    assert admitted(take(permits, TWO_A_SECOND))
    assert not admitted(take(permits, TWO_A_SECOND))


@pytest.mark.parametrize("policy", EVERY_RATE, ids=kind)
def test_a_booking_admits_no_more_than_the_rate(permits: PermitStore, micros: MicroClock, policy: Rate) -> None:
    """Forged, late or early: who says it has booked is asked of the rate like everybody."""
    times: list[int] = []
    for _ in range(60):
        times += [micros.passed] * sum(admitted(take(permits, policy, book=True, booked=True)) for _ in range(5))
        micros.advance(0.5)
    most = 6 if isinstance(policy, FixedWindow) else 5  # burst + rate * time, or its documented bound
    assert max(sum(1 for other in times if at <= other < at + 10_000_000) for at in times) <= most
    assert len(times) >= 7


def test_who_comes_late_does_not_go_to_the_end_of_the_line(permits: PermitStore, micros: MicroClock) -> None:
    """Two booked calls arrive together: one goes, the other is paced among the late, not behind forty who booked."""
    take(permits, TWO_A_SECOND)
    assert booked_line(permits, 40)[-1] == 20.0
    micros.advance(1.0)
    answers = [take(permits, TWO_A_SECOND, book=True, booked=True) for _ in range(4)]
    assert admitted(answers[0])
    assert [slot_in(answer) for answer in answers[1:]] == [0.5, 1.0, 1.5]
    assert booked_line(permits, 1) == [19.5]


def test_a_slot_that_was_given_back_is_the_next_ones(permits: PermitStore, micros: MicroClock) -> None:
    """The earliest first; one that is past, or that was never booked, is nobody's."""
    take(permits, TWO_A_SECOND)
    assert booked_line(permits, 5)[-1] == 2.5
    for at in (2.0, 1.0, 0.0, -5.0):
        permits.unbook("bank", START + at)
    permits.unbook("bank", START + 2.0)
    assert booked_line(permits, 3) == [1.0, 2.0, 3.0]
    permits.unbook("bank", START + 1.0)
    micros.advance(1.0)
    assert booked_line(permits, 1) == [2.5]


def test_giving_back_what_was_never_booked_changes_nothing(permits: PermitStore) -> None:
    """Neither where there is no line nor where there is no limit of that name."""
    permits.unbook("bank", START + 5.0)
    permits.unbook("nobody's", START + 5.0)
    assert admitted(take(permits, TWO_A_SECOND))
    assert booked_line(permits, 2) == [0.5, 1.0]


def both(*names: str, book: bool = False, booked: bool = False) -> Ask:
    """One call that two or more limits of one in ten seconds, or a day, must admit."""
    policies = {"second": TWO_A_SECOND, "day": FixedWindow(2, per=86400), "tenant": TokenBucket(1, per=10)}
    return Ask(rates=tuple(RateAsk(name, policies[name]) for name in names), book=book, booked=booked)


def test_stacked_limits_debit_all_or_nothing(permits: PermitStore, micros: MicroClock) -> None:
    """A refusal by the last of them leaves the first as it was, and the longest wait is told."""
    assert admitted(permits.admit(both("second", "tenant")))
    micros.advance(1)
    refusal = permits.admit(both("second", "tenant"))
    assert isinstance(refusal, Refusal)
    assert (refusal.by, refusal.name, refusal.retry_after) == ("rate", "tenant", 9.0)
    assert [view.remaining for view in refusal.rates] == [1, 0]
    assert admitted(permits.admit(both("second")))


def test_the_longest_wait_is_told_whichever_comes_first(permits: PermitStore) -> None:
    """Both refuse: the wait is the one after which both will have room; a limit that never will wins."""
    permits.admit(both("second", "tenant"))
    for names in (("second", "tenant"), ("tenant", "second")):
        refusal = permits.admit(both(*names))
        assert isinstance(refusal, Refusal)
        assert (refusal.name, refusal.retry_after) == ("tenant", 10.0)
    never = RateAsk("never", TokenBucket(1), cost=2)
    refusal = permits.admit(Ask(rates=(*both("second", "tenant").rates, never), book=True))
    assert isinstance(refusal, Refusal)
    assert (refusal.name, refusal.retry_after, refusal.slot_in) == ("never", None, None)


def test_stacked_limits_book_the_latest_slot(permits: PermitStore) -> None:
    """The slot is one at which the slowest of those that refused has room."""
    permits.admit(both("second", "tenant"))
    slots = [slot_in(permits.admit(both("second", "tenant", book=True))) for _ in range(3)]
    assert slots == [10.0, 20.0, 30.0]


def test_a_tenant_without_permits_sends_nobody_elses_line_to_tomorrow(permits: PermitStore) -> None:
    """Its booking is hours away; the limit it shares with others gives them the slots it would have given."""
    for _ in range(2):
        permits.admit(both("day"))
    assert admitted(permits.admit(both("second")))
    assert slot_in(permits.admit(both("second", "day", book=True))) > 10_000
    assert slot_in(permits.admit(both("second", book=True))) == 0.5
    assert slot_in(permits.admit(both("second", book=True))) == 1.0


def test_limits_that_are_equally_late_move_together(permits: PermitStore) -> None:
    """Where one slot is less than an interval before the other, both lines have it, so that nobody is sent twice."""
    names = (RateAsk("a", TWO_A_SECOND), RateAsk("b", TokenBucket(1, per=0.6)))
    assert admitted(permits.admit(Ask(rates=names)))
    assert slot_in(permits.admit(Ask(rates=names, book=True))) == 0.6
    assert slot_in(permits.admit(Ask(rates=names[:1], book=True))) == 1.1


def test_the_same_limit_twice_in_one_call_is_spent_twice(permits: PermitStore) -> None:
    """Nested declarations of one limit do not share a permit."""
    twice = Ask(rates=(RateAsk("a", TokenBucket(3)), RateAsk("a", TokenBucket(3))))
    answer = permits.admit(twice)
    assert admitted(answer)
    assert [view.remaining for view in answer.rates] == [1, 1]
    assert not admitted(permits.admit(twice))
    assert admitted(permits.admit(Ask(rates=twice.rates[:1])))
