"""Places of a bulkhead: leases that a fleet shares, on every backend."""

from __future__ import annotations

import pytest

from taskguard.permits import Ask, RateAsk, Refusal, SlotAsk
from taskguard.policies.rates import TokenBucket
from taskguard.ports import PermitStore
from tests.contracts.permits import START, MicroClock, admitted, place, slot, slot_in, take, wait_us


def test_as_many_places_as_the_limit(permits: PermitStore) -> None:
    """The third of two is refused, and says by whom; one given back is the next one's."""
    assert admitted(place(permits, "a", limit=2))
    assert admitted(place(permits, "b", limit=2))
    refusal = place(permits, "c", limit=2)
    assert isinstance(refusal, Refusal)
    assert (refusal.by, refusal.name) == ("slot", "bank")
    permits.release([slot("a")])
    assert admitted(place(permits, "c", limit=2))
    assert not admitted(place(permits, "a", limit=2))


def test_a_holder_that_asks_again_has_its_place(permits: PermitStore, micros: MicroClock) -> None:
    """A call repeated because its answer was lost takes no second place, and its lease runs from then."""
    assert admitted(place(permits, "a", lease=10))
    micros.advance(6)
    assert admitted(place(permits, "a", lease=10))
    micros.advance(9)
    assert not admitted(place(permits, "b"))
    permits.release([slot("a")])
    assert admitted(place(permits, "b"))


def test_a_killed_holders_place_comes_back_when_its_lease_ends(permits: PermitStore, micros: MicroClock) -> None:
    """By itself, at that instant and not before."""
    place(permits, "killed", lease=10)
    micros.advance(us=9_999_999)
    assert wait_us(place(permits, "b")) == 1
    micros.advance(us=1)
    assert admitted(place(permits, "b"))


def test_a_lease_that_is_renewed_goes_on(permits: PermitStore, micros: MicroClock) -> None:
    """A long call keeps its place by its heartbeat; one that lost it is told, and does not take it back."""
    place(permits, "a", lease=10)
    micros.advance(9)
    assert permits.renew_slots([slot("a"), slot("nobody")], lease=10) == [True, False]
    micros.advance(9)
    assert not admitted(place(permits, "b"))
    micros.advance(1)
    assert admitted(place(permits, "b"))
    assert permits.renew_slots([slot("a")], lease=10) == [False]
    assert permits.renew_slots([slot("b")], lease=10) == [True]
    assert permits.renew_slots([], lease=10) == []


def test_releasing_what_one_does_not_hold_changes_nothing(permits: PermitStore, micros: MicroClock) -> None:
    """Twice, by somebody else, or after the lease is over: nobody else's place is given away."""
    place(permits, "a", lease=10)
    permits.release([slot("stranger")])
    assert not admitted(place(permits, "b"))
    micros.advance(10)
    assert admitted(place(permits, "b"))
    permits.release([slot("a"), slot("a")])
    assert not admitted(place(permits, "c"))
    permits.release([])


def test_a_release_rides_on_the_next_admission(permits: PermitStore) -> None:
    """The place that a call gives back in the same step is free for it, also where it is refused otherwise."""
    place(permits, "a")
    ask = SlotAsk("bank", 1, "b", 10.0)
    assert admitted(permits.admit(Ask(slot=ask, release=(slot("a"),))))
    spent = RateAsk("rate", TokenBucket(1))
    assert admitted(permits.admit(Ask(rates=(spent,))))
    assert not admitted(permits.admit(Ask(rates=(spent,), release=(slot("b"),))))
    assert admitted(place(permits, "c"))


def test_a_full_bulkhead_spends_no_permit_and_a_spent_rate_takes_no_place(permits: PermitStore) -> None:
    """All or nothing, in either order."""
    policy = TokenBucket(1)
    place(permits, "a")
    ask = Ask(rates=(RateAsk("bank", policy),), slot=SlotAsk("bank", 1, "b", 10.0))
    refusal = permits.admit(ask)
    assert isinstance(refusal, Refusal)
    assert (refusal.by, refusal.rates[0].remaining) == ("slot", 1)
    permits.release([slot("a")])
    assert admitted(take(permits, policy))
    refusal = permits.admit(ask)
    assert isinstance(refusal, Refusal)
    assert refusal.by == "rate"
    assert admitted(place(permits, "c"))


def test_the_wait_is_how_long_places_are_held(permits: PermitStore, micros: MicroClock) -> None:
    """A second where nothing is known; then a moving average, a fifth of it the newest; the lease's end at most."""
    place(permits, "a", limit=2, lease=100)
    place(permits, "b", limit=2, lease=100)
    assert wait_us(place(permits, "c", limit=2)) == 500_000
    micros.advance(4)
    permits.release([slot("a")])
    place(permits, "c", limit=2, lease=100)
    assert wait_us(place(permits, "d", limit=2)) == 2_000_000
    micros.advance(5)
    permits.release([slot("b")])  # held for 9 s: 4 + 0.2 * (9 - 4)
    place(permits, "d", limit=2, lease=100)
    assert wait_us(place(permits, "e", limit=2)) == 2_500_000
    assert permits.renew_slots([slot("d")], lease=0) == [True]
    micros.advance(94)
    assert wait_us(place(permits, "e", limit=2)) == 1_000_000


def test_a_lease_that_ended_teaches_nothing_about_how_long_work_takes(permits: PermitStore, micros: MicroClock) -> None:
    """The wait stays what it was."""
    place(permits, "a")
    micros.advance(2)
    permits.release([slot("a")])
    place(permits, "killed", lease=1000)
    micros.advance(1000)
    permits.release([slot("killed")])
    place(permits, "b", lease=1000)
    assert wait_us(place(permits, "c")) == 2_000_000


def test_refused_calls_book_places_at_the_pace_of_the_work(permits: PermitStore, micros: MicroClock) -> None:
    """Two places held for four seconds each: one becomes free every two. Who has not booked is let in where it can."""
    for holder in ("a", "b"):
        place(permits, holder, limit=2, lease=100)
    micros.advance(4)
    permits.release([slot("a")])
    place(permits, "c", limit=2, lease=100)
    assert [slot_in(place(permits, f"d{n}", limit=2, book=True)) for n in range(3)] == [2.0, 4.0, 6.0]
    permits.unbook("bank", START + 4.0 + 4.0)
    assert slot_in(place(permits, "e", limit=2, book=True)) == 4.0
    permits.release([slot("b")])
    assert admitted(place(permits, "f", limit=2))


def test_a_bulkhead_that_was_made_smaller_lets_nobody_in_until_it_fits(permits: PermitStore) -> None:
    """Those inside stay; the limit is the asking one's."""
    for holder in ("a", "b", "c"):
        assert admitted(place(permits, holder, limit=3))
    permits.release([slot("a")])
    assert not admitted(place(permits, "d", limit=1))
    permits.release([slot("b")])
    assert not admitted(place(permits, "d", limit=1))
    permits.release([slot("c")])
    assert admitted(place(permits, "d", limit=1))


@pytest.mark.parametrize("holder", ["a b", "{x}", "a\nb", "ä", "a:b", 'a"b\\'], ids=repr)
def test_a_holder_is_called_whatever_it_is(permits: PermitStore, holder: str) -> None:
    """Its name comes back from the store as it went in."""
    assert admitted(place(permits, holder))
    assert not admitted(place(permits, "other"))
    assert permits.renew_slots([slot(holder)], lease=5) == [True]
    permits.release([slot(holder)])
    assert admitted(place(permits, "other"))


def test_a_wait_of_which_nothing_is_known_is_never_a_moment(permits: PermitStore, micros: MicroClock) -> None:
    """However many places there are: 50 ms at least, until one was given back."""
    for number in range(40):
        place(permits, f"h{number}", limit=40, lease=100)
    assert wait_us(place(permits, "late", limit=40)) == 50_000
    micros.advance(us=80_000)
    permits.release([slot("h0")])
    place(permits, "next", limit=40, lease=100)
    assert wait_us(place(permits, "late", limit=40)) == 2_000
