"""taskguard's own header: what travels with a message, and what belongs to one delivery alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskguard import headers
from taskguard.envelope import Envelope
from taskguard.headers import Booking, bookings, next_attempt, spared, stamped, with_bookings, with_deadline
from tests.contracts.messages import message

BOOKED = {"bank": Booking(1_800_000_000.25, "bank/key:acme"), "mail": Booking()}


def test_a_booking_travels_to_the_next_delivery() -> None:
    """Through the bytes in which the message rests, to the millisecond."""
    resting = Envelope.from_wire(with_bookings(message(), BOOKED, spared=2).to_wire())
    assert bookings(resting) == BOOKED
    assert spared(resting) == 2
    assert resting.headers[headers.KEY].items() >= (message().headers.get(headers.KEY) or {}).items()


def test_a_booking_is_one_deliverys_alone() -> None:
    """A retry, a requeue and a changed deadline begin without one: it was for the run that has been."""
    booked = with_bookings(message(), BOOKED, spared=2)
    for following in (next_attempt(booked, retries=1), with_deadline(booked, 1.9e9)):
        assert bookings(following) == {}
        assert spared(following) == 0
    assert headers.BOOKED not in stamped(booked)[headers.KEY]


def test_a_message_without_a_booking_has_none() -> None:
    """Nor has one that no producer of ours stamped."""
    assert bookings(message()) == {}
    assert bookings(message().replace(headers={})) == {}
    assert spared(message().replace(headers={headers.KEY: "text"})) == 0


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(anything, anything)
def test_whatever_a_header_holds_is_read_or_left_out(booked: object, count: object) -> None:
    """Anyone may write one."""
    forged = message().replace(headers={headers.KEY: {headers.BOOKED: booked, headers.SPARED: count}})
    for name, booking in bookings(forged).items():
        assert isinstance(name, str)
        assert 0 <= booking.at <= 253_402_300_799
        assert isinstance(booking.limit, str)
    assert spared(forged) >= 0
