"""What waits in an outbox by itself: a message that the broker would take, and something else does not let go out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from taskguard.envelope import Envelope
from taskguard.handover import LATER, Handed, Held, Outgoing
from taskguard.record import State
from tests.contracts.messages import existing
from tests.contracts.test_outbox import House, Outcomes, house

__all__ = ["house"]

WHY = ConnectionError("the backend is away")


def holding(house: House, *held: str) -> object:
    """A broker that takes all but these keys, which are held, and what follows them in their order."""

    def dispatch(rows: Sequence[Outgoing]) -> Outcomes:
        outcomes: Outcomes = []
        stopped: set[str] = set()
        for row in rows:
            if Envelope.from_wire(row.wire).key in held:
                outcomes.append(Held(later=WHY))
                stopped.add(row.ordering)
            elif row.ordering and row.ordering in stopped:
                outcomes.append(Held())
            else:
                outcomes += house.broker([row])
        return outcomes

    return dispatch


def test_what_is_held_by_itself_waits_untried_and_the_others_go_out(house: House) -> None:
    """It is not asked for again and again, and is no dead letter however long it takes."""
    house.write("chord", "a", "b")
    dispatch = holding(house, "chord")
    handed = house.store.outbox.hand_over(dispatch, limit=9, lease=30, retention=0)  # type: ignore[arg-type]
    assert handed == Handed(taken=3, published=2, later=WHY)
    assert house.broker.keys == ["a", "b"]
    record = existing(house.store, house.envelope("chord").copy_id)
    assert (record.state, record.crashes, record.attempts) == (State.PENDING, 0, [])
    assert record.due_at == pytest.approx(house.store.now() + LATER, abs=3)
    assert house.hand_over() == Handed(), "not before its time"


def test_a_batch_of_nothing_else_is_no_outage(house: House) -> None:
    """The rows behind it have their turn at once."""
    house.write("c1", "c2", due_at_ms=1)
    house.write("a")
    dispatch = holding(house, "c1", "c2")
    handed = house.store.outbox.hand_over(dispatch, limit=2, lease=30, retention=0)  # type: ignore[arg-type]
    assert handed == Handed(taken=2, later=WHY)
    assert house.hand_over(limit=2).published == 1
    assert house.broker.keys == ["a"]


def test_what_is_held_by_itself_holds_up_its_key(house: House) -> None:
    """And no other: the order of a key stands."""
    house.write("a1", "a2", ordering="a")
    house.write("b1", ordering="b")
    dispatch = holding(house, "a1")
    handed = house.store.outbox.hand_over(dispatch, limit=9, lease=30, retention=0)  # type: ignore[arg-type]
    assert (handed.published, handed.away) == (1, None)
    assert house.hand_over() == Handed()
    assert house.broker.keys == ["b1"]
